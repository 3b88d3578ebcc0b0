"""Cut a network at a layer, expand the latent batch there and split the predictions, in PyTorch without Composer."""

from composer_sba.latent.cut_survey import Cut, survey
from composer_sba.latent.expander import LatentExpander
from composer_sba.latent.layers import CutLayer, find_layers, named_layers

__all__ = ['Cut', 'CutLayer', 'LatentExpander', 'find_layers', 'named_layers', 'survey']
