"""Colours, markers and Matplotlib settings of the figures.

The colours are Okabe and Ito's, which colour-blind readers can distinguish. Each colour stands for a kind of method in
all figures, and each marker for one method of that kind.
"""

INK, GREY, MID_GREY, LIGHT_GREY = '#262626', '#4d4d4d', '#8c8c8c', '#c8c8c8'
ORANGE, SKY, GREEN, BLUE, RED, PINK = '#E69F00', '#56B4E9', '#009E73', '#0072B2', '#D55E00', '#CC79A7'
METHOD_STYLES = {  # method -> colour, marker
    'baseline': (GREY, 'o'),
    'longer': (GREY, 'D'),
    'twice': (GREY, 's'),
    'sba': (RED, 'o'),
    'sba_conv': (RED, 'D'),
    'sba_strong': (RED, 's'),
    'sba_robust': (RED, 'v'),
    'sba_robust_every_step': (RED, 'P'),
    'sba_robust_gaussian_half': (RED, 'X'),
    'cutout_sba': (RED, '^'),
    'ba': (BLUE, 'o'),
    'ba2': (BLUE, 'D'),
    'latent_ba': (BLUE, 's'),
    'latent_ba_input': (BLUE, 'v'),
    'cutout': (GREEN, 'o'),
    'cutmix': (GREEN, 'D'),
    'cutout_ba': (GREEN, 's'),
    'cutout_ba2': (GREEN, '^'),
    'gaussian': (SKY, 's'),
    'gaussian_half': (SKY, '^'),
    'gaussian_half_longer': (SKY, 'v'),
    'gaussian_half_twice': (SKY, 'P'),
    'mixup': (PINK, 'o'),
    'manifold_mixup': (PINK, 'D'),
    'label_smoothing': (ORANGE, 'o'),
    'r_drop': (ORANGE, 'D'),
    'sam': (SKY, 'o'),
    'ema': (SKY, 'D'),
    'augmix': (GREEN, 'v'),
}
OTHER_STYLE = ('#000000', '^')
RC_PARAMS = {
    'font.family': 'DejaVu Sans',  # comes with Matplotlib, which makes figures equal on every machine
    'font.size': 9.5,
    'axes.titlesize': 9.5,
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.7,
    'axes.edgecolor': GREY,
    'xtick.color': GREY,
    'ytick.color': GREY,
    'axes.labelcolor': INK,
    'xtick.labelcolor': INK,
    'ytick.labelcolor': INK,
    'text.color': INK,
    'lines.markersize': 5.5,
    'lines.linewidth': 1.3,
}
