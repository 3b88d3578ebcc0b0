"""Recipes: YAML files that describe a whole run, read and checked."""

from composer_sba.recipe.recipe import Recipe, component_arguments, load, save, to_yaml

__all__ = ['Recipe', 'component_arguments', 'load', 'save', 'to_yaml']
