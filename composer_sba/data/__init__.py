"""Datasets of images in MDS shards: conversion, transforms and DataLoaders."""

from composer_sba.data.config import DatasetConfig
from composer_sba.data.conversion import convert
from composer_sba.data.loader import build_dataloader, build_dataspec, dataset_classes, dataset_size
from composer_sba.data.transforms import Cutout, image_size, transform

__all__ = [
    'Cutout',
    'DatasetConfig',
    'build_dataloader',
    'build_dataspec',
    'convert',
    'dataset_classes',
    'dataset_size',
    'image_size',
    'transform',
]
