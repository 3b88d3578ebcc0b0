"""From an image to the tensor that a network gets, as a recipe says."""

from collections.abc import Callable

from torchvision import transforms

from composer_sba.cutout import Cutout
from composer_sba.dataset_config import DatasetConfig, check, default_for_training, index
from composer_sba.decode import to_rgb
from composer_sba.errors import DatasetError
from composer_sba.index import RECORD
from composer_sba.pixels import Pipeline, RandomResizedCrop, ToFloats


def transform(config: DatasetConfig) -> transforms.Compose:
    """Build the transforms from an image to a normalized tensor.

    Training: small images are padded, cropped and, digits excepted, flipped; others get torchvision's random resized
    crop and flip. Evaluation: small images are left as they are, others resized and cropped at the centre.

    The DataLoader decodes JPEGs for a random resized crop to tensors, unless a transform that needs PIL images, as
    Composer's RandAugment, is put before ``ToTensor``. The crops are the same, for a fifth less of a worker's time,
    and a pixel differs from PIL's by at most one of 255 levels. In evaluation PIL does all.

    Args:
        config (DatasetConfig): The data set.

    Returns:
        torchvision.transforms.Compose: PIL image of any mode, or RGB as a uint8 tensor if its ``takes_tensors`` is
        true -> shape ``(3, H, W)``, float32.

    Raises:
        DatasetError: If the config has a key that is wrong for this data set.

    Example:
        >>> from PIL import Image
        >>> transform(DatasetConfig('cifar10'))(Image.new('L', (32, 32))).shape
        torch.Size([3, 32, 32])
    """
    known = check(config)
    train = default_for_training(config, config.augment)
    flip = [transforms.RandomHorizontalFlip()] if known.flip and train else []
    crop_size, resize_size = config.crop_size or 224, config.resize_size or 256
    crop: list[Callable]
    if known.size is not None:
        crop = [to_rgb, *([transforms.RandomCrop(known.size, padding=known.padding)] if train else [])]
    elif train:
        crop = [RandomResizedCrop(crop_size)]
    elif crop_size <= resize_size:
        crop = [to_rgb, transforms.Resize(resize_size), transforms.CenterCrop(crop_size)]
    else:
        raise DatasetError(f'resize_size: {resize_size} is smaller than crop_size: {crop_size}: choose a larger one')
    mean, std = config.mean, config.std
    if config.name == 'imagefolder' and (mean is None or std is None):
        record = index(config).get(RECORD, {})
        mean, std = mean or record.get('mean'), std or record.get('std')
    normalize = transforms.Normalize(mean or known.mean, std or known.std)
    cutout = [Cutout(config.cutout)] if config.cutout is not None and train else []
    return Pipeline([*crop, *flip, ToFloats(), normalize, *cutout])


def image_size(config: DatasetConfig) -> int:
    """Tell height and width of the images after the transforms; unit: pixels.

    Example:
        >>> image_size(DatasetConfig('cifar10')), image_size(DatasetConfig('imagenet'))
        (32, 224)
    """
    return check(config).size or config.crop_size or 224
