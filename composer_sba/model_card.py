"""The model card that training writes beside its checkpoints: use, data, results, versions and recipe, as Markdown."""

from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from typing import Any

from composer_sba.data.config import DatasetConfig
from composer_sba.data.loader import dataset_size
from composer_sba.data.transforms import image_size
from composer_sba.provenance import commit, versions
from composer_sba.recipe.recipe import Recipe, to_yaml

NAMED_CLASSES = 20  # at most so many in the card


def model_card(recipe: Recipe, images: Mapping[str, Any], checkpoint: str, results: Iterable[tuple[str, str]]) -> str:
    """Describe a trained network.

    The front matter is that of the HuggingFace hub. Its licence is left to the author.

    Args:
        recipe (Recipe): From :func:`composer_sba.recipe.load`: the one that was trained.
        images (Mapping[str, Any]): From :func:`composer_sba.trained.dataset_record`.
        checkpoint (str): Name of the checkpoint's file in the folder of the card.
        results (Iterable[tuple[str, str]]): Names and values to report, such as an accuracy.

    Returns:
        str: Markdown. Secrets in the recipe are hidden.
    """
    model = recipe.model
    classes = images['classes'] or []
    named = ', '.join(classes[:NAMED_CLASSES]) + ', ...' * (len(classes) > NAMED_CLASSES)
    size = image_size(DatasetConfig(**(recipe.eval_dataset or recipe.train_dataset)))
    data = {'images': f'RGB, {size}x{size} pixels', 'classes': f'{model["num_classes"]}: {named}'.rstrip(': ')}
    data |= {f'{key}s of the channels': ', '.join(f'{each:.4g}' for each in images[key]) for key in ('mean', 'std')}
    for section in ('train_dataset', 'eval_dataset'):
        if getattr(recipe, section) is not None:
            config = DatasetConfig(**getattr(recipe, section))
            data[section] = f'{config.name}, {config.split}, {dataset_size(config):,} images'
    method = ' and '.join(recipe.algorithms) or 'no algorithm'
    return f"""---
license:  # to be added by the author
library_name: composer
pipeline_tag: image-classification
---

# {recipe.run_name}

{model['name']}, a classifier of images, trained with {method} by composer-sba.

Licence: to be added by the author, who also considers the licences of the data and of pretrained weights.

## Use

```console
$ composer-sba predict --checkpoint {checkpoint} FOLDER
```

## Data

{_table(data.items())}

## Results

{_table(results)}

## Versions

{_table([*versions().items(), ('commit', commit()), ('date', datetime.now(timezone.utc).date().isoformat())])}

## Recipe

```yaml
{to_yaml(recipe)}```
"""


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = [(name, value.replace('|', r'\|')) for name, value in rows]
    return '\n'.join(['| | |', '|---|---|', *(f'| {name} | {value} |' for name, value in cells)])
