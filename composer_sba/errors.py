"""What a user can get wrong. Each message is one line that names the culprit; train.py prints it and exits with 2."""


def first_line(error: BaseException) -> str:
    """Give the first line of what an exception says, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UserError(ValueError):
    """A mistake in what the user gave, told in one line that says what to change."""


class RecipeError(UserError):
    """A recipe, or an override of it, that cannot be trained: names the file and the key."""


class AlreadyTrainedError(RecipeError):
    """A run that is resumed and has its whole duration behind it."""


class DatasetError(UserError):
    """Data that is missing, half-written or corrupted: names the path and the command that makes it."""


class TooWideError(UserError):
    """A dense basis for a layer with more features than its matrix may have: names both, and what would do."""


class CutLayerError(UserError):
    """A layer that cannot be cut, or a model that has none: names the layer, the reason and what would do."""


class NonFiniteError(UserError):
    """A divergence that is NaN or infinite: names the batch, the layer and what to try."""
