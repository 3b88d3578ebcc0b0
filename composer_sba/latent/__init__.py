"""Cut a network at a layer, multiply the latent batch there, split the predictions. Plain PyTorch, without Composer."""

from composer_sba.latent.cut_survey import Cut, survey
from composer_sba.latent.expander import LatentExpander
from composer_sba.latent.layers import CutLayer, find_layers, named_layers

__all__ = ['Cut', 'CutLayer', 'LatentExpander', 'find_layers', 'named_layers', 'survey']
