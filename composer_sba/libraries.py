"""Networks of torchvision, timm and HuggingFace by name, and the images that they expect.

====================================  ============================================================================
name                                  network
====================================  ============================================================================
``torchvision/resnet18``              a classifier of torchvision
``timm/vit_tiny_patch16_224``         a model of timm; with a tag (``timm/resnet18.a1_in1k``) that of the weights
``huggingface/vit``                   an architecture of transformers, with its default configuration
``huggingface/FOLDER``                the folder of a saved model: ``config.json`` and, if any, weights
``huggingface/google/vit-base-...``   a model of huggingface.co, whose configuration is downloaded
====================================  ============================================================================

All have random weights unless ``pretrained`` is true. A library is imported when one of its networks is named.
"""

import difflib
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import nn

from composer_sba.errors import UserError, nearest, one_line

# By default, these return auxiliary outputs in training. Their published weights expect that they transform the input.
_AUXILIARY = {'googlenet': ('aux1', 'aux2'), 'inception_v3': ('AuxLogits',)}


@dataclass(frozen=True)
class LibraryModel:
    """A network of a library.

    Attributes:
        build: ``build(num_classes=None, pretrained=False, **arguments)`` returns a network from images to logits. The
            arguments are those of the library. ``num_classes=None`` keeps the library's number.
        data_config: ``data_config(arguments)`` returns the keys of a recipe's dataset that follow from the model:
            ``mean``, ``std``, ``crop_size`` and ``resize_size``, as far as the library knows them.
    """

    build: Callable[..., nn.Module]
    data_config: Callable[[Mapping[str, Any]], dict[str, Any]]


def find(name: str) -> LibraryModel:
    """Find a network by its name.

    Args:
        name (str): ``<library>/<model>``, as in the table above.

    Returns:
        LibraryModel: How to build it, and the images that it expects.

    Raises:
        UserError: If there is no such library or model, or if the library is not installed.

    Example:
        >>> find('torchvision/resnet18').build(num_classes=10)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    library, _, model = name.partition('/')
    if library not in LIBRARIES:
        raise UserError(f"unknown library '{library}' in '{name}'{nearest(library, LIBRARIES)}", 'name')
    return LIBRARIES[library](model)


class HuggingFaceNetwork(nn.Module):
    """A HuggingFace model of images as a network from images to logits.

    The loss is then computed outside the model, so labels may be soft and every layer can be cut. The layers keep
    HuggingFace's names.

    Args:
        module (transformers.PreTrainedModel): Takes ``pixel_values`` and returns an output with ``logits``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module  # as in ComposerClassifier and DDP: a name that is left out of the names of layers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits, shape ``(N, K)``, for ``images``, shape ``(N, 3, H, W)``."""
        return self.module(pixel_values=images).logits


def _torchvision(name: str) -> LibraryModel:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise _unknown('torchvision', name, known)
    entry = torchvision.models.get_model_builder(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    network_class = typing.get_type_hints(entry)['return']

    def build(num_classes: int | None = None, pretrained: bool = False, **arguments: Any) -> nn.Module:
        auxiliary = _AUXILIARY.get(name, ())
        if not pretrained or _on_meta():
            classes = {} if num_classes is None else {'num_classes': num_classes}
            if auxiliary:
                arguments = {'aux_logits': False, 'init_weights': True, 'transform_input': True} | arguments
            with _naming_unknown_keys(arguments, network_class):
                return entry(weights=None, **classes, **arguments)
        with _naming_unknown_keys(arguments, network_class), _fetching():
            network = entry(weights=weights, **arguments)
        for each in auxiliary:  # torchvision builds them to load the weights
            setattr(network, each, None)
            network.aux_logits = False
        fetched = len(weights.meta['categories'])
        if num_classes is not None and num_classes != fetched:
            linears = [each for each, module in network.named_modules() if isinstance(module, nn.Linear)]
            if not linears:
                problem = f'expected {fetched}, as the weights of {name} have, got {num_classes}'
                raise UserError(
                    f'{problem}: the classifier is not an nn.Linear, so it cannot be replaced', 'num_classes'
                )
            features = network.get_submodule(linears[-1]).in_features
            network.set_submodule(linears[-1], nn.Linear(features, num_classes))
        return network

    def data_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
        size = _side(arguments.get('image_size'))  # of a vision transformer
        if not arguments.get('pretrained'):
            return _sizes(size, size)
        images = weights.transforms()
        statistics = {'mean': [*images.mean], 'std': [*images.std]}
        return {**statistics, **_sizes(size or images.crop_size[0], images.resize_size[0])}

    return LibraryModel(build, data_config)


def _timm(name: str) -> LibraryModel:
    timm = _installed('timm', f'timm/{name}', 'timm')
    architecture = name.partition('.')[0]
    if not timm.is_model(architecture):
        raise _unknown('timm', name, timm.list_models())
    try:
        weights = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # the part after the point names no weights
        raise _unknown('timm', name, timm.list_pretrained(architecture) or [architecture]) from error
    network_class = typing.get_type_hints(timm.model_entrypoint(architecture)).get('return')

    def build(num_classes: int | None = None, pretrained: bool = False, **arguments: Any) -> nn.Module:
        classes = {} if num_classes is None else {'num_classes': num_classes}
        with _naming_unknown_keys(arguments, network_class), _fetching():
            return timm.create_model(name, pretrained=pretrained and not _on_meta(), **classes, **arguments)

    def data_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
        size = {'img_size': _side(arguments.get('img_size'))}
        images = timm.data.resolve_data_config(size, pretrained_cfg=weights.to_dict() if weights else {})
        crop = images['input_size'][-1]
        statistics = {'mean': [*images['mean']], 'std': [*images['std']]}
        return {**statistics, **_sizes(crop, int(crop / images['crop_pct']))}

    return LibraryModel(build, data_config)


def _huggingface(name: str) -> LibraryModel:
    transformers = _installed('transformers', f'huggingface/{name}', 'huggingface')
    path = os.path.expanduser(name)
    architectures = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    is_architecture = name in architectures and not os.path.isdir(path)
    if not (is_architecture or os.path.isdir(path) or re.fullmatch(r'[\w.-]+/[\w.-]+', name)):
        raise _unknown('huggingface', name, architectures, '; or give an existing folder, or a model of huggingface.co')

    def saved_config() -> dict[str, Any]:
        if is_architecture:
            return {'model_type': name}
        try:
            saved = transformers.PretrainedConfig.get_config_dict(path)[0]
        except OSError as error:
            raise UserError(f"the configuration of '{name}' cannot be read: {one_line(error)}", 'name') from error
        if saved.get('model_type') not in architectures:
            problem = f"expected a model that classifies images, got '{name}' of type {saved.get('model_type')}"
            raise UserError(problem, 'name')
        return saved

    def build(num_classes: int | None = None, pretrained: bool = False, **arguments: Any) -> nn.Module:
        saved = saved_config()
        accepted = _names(transformers.CONFIG_MAPPING[saved['model_type']])
        for key in arguments:  # transformers would keep any key
            if key not in accepted:
                raise _unknown_key(key, accepted)
        config = transformers.AutoConfig.for_model(**(saved | arguments))
        if num_classes is not None:
            config.num_labels = num_classes
        auto = transformers.AutoModelForImageClassification
        if not pretrained or _on_meta():
            return HuggingFaceNetwork(auto.from_config(config).float())
        if is_architecture:
            problem = f"'{name}' is an architecture, which has no weights: name a folder or a model of huggingface.co"
            raise UserError(problem, 'pretrained')
        with _fetching():
            return HuggingFaceNetwork(auto.from_pretrained(path, config=config, ignore_mismatched_sizes=True).float())

    def data_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
        default = transformers.AutoConfig.for_model(**saved_config())
        size = _side(arguments.get('image_size'))
        found = not is_architecture and transformers.utils.cached_file(
            path, 'preprocessor_config.json', _raise_exceptions_for_missing_entries=False
        )
        if not found:
            size = size or _side(getattr(default, 'image_size', None))
            return _sizes(size, size)
        images = transformers.ImageProcessingMixin.get_image_processor_dict(path)[0]
        statistics = {key: images.get(f'image_{key}') for key in ('mean', 'std')}
        if images.get('do_normalize') is False:
            statistics = {'mean': [0.0] * 3, 'std': [1.0] * 3}
        resize = size or _side(images.get('size'))
        crop = _side(images.get('crop_size')) if images.get('do_center_crop') else None
        sizes = _sizes(size or crop or resize, resize and int(resize / (images.get('crop_pct') or 1)))
        return {key: value for key, value in statistics.items() if value is not None} | sizes

    return LibraryModel(build, data_config)


LIBRARIES: dict[str, Callable[[str], LibraryModel]] = {
    'torchvision': _torchvision,
    'timm': _timm,
    'huggingface': _huggingface,
}


def _installed(module: str, name: str, extra: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{name} needs {module}: pip install 'composer-sba[{extra}]' ({one_line(error)})") from error


def _unknown(library: str, name: str, known: Iterable[str], otherwise: str = '') -> UserError:
    closest = difflib.get_close_matches(name, known, n=3, cutoff=0)
    return UserError(f"unknown model '{name}'; nearest in {library}: {', '.join(closest)}{otherwise}", 'name')


def _names(build: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(build).parameters.values()
    return [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]


def _unknown_key(key: str, known: Iterable[str]) -> UserError:
    return UserError(f'unknown key{nearest(key, {*known, "num_classes", "pretrained"})}', key)


@contextmanager
def _naming_unknown_keys(arguments: Mapping[str, Any], network_class: Any) -> Iterator[None]:
    """Raise an error that names the key that a library refuses, and the nearest parameter of the network's class."""
    try:
        yield
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in arguments:
            raise
        raise _unknown_key(refused[1], _names(network_class) if inspect.isclass(network_class) else []) from error


@contextmanager
def _fetching() -> Iterator[None]:
    """Raise a one-line error if weights cannot be downloaded or read."""
    try:
        yield
    except OSError as error:
        problem = f'the weights cannot be fetched: {one_line(error)}; pretrained: false starts from random weights'
        raise UserError(problem, 'pretrained') from error


def _on_meta() -> bool:
    """Return whether tensors are made on the meta device, as in ``--dry-run``: they have no values to fetch."""
    return torch.empty(0).device.type == 'meta'


def _side(size: Any) -> int | None:
    """Return height or width of a size as the libraries write it: a number, a pair, or a mapping."""
    if isinstance(size, Mapping):
        size = size.get('shortest_edge', size.get('height'))
    if isinstance(size, list | tuple) and size:
        size = size[0]
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _sizes(crop: int | None, resize: int | None) -> dict[str, int]:
    return {} if crop is None else {'crop_size': crop, 'resize_size': max(crop, resize or crop)}
