"""Colours, markers and style of the figures.

The colours are Okabe and Ito's, which the colour-blind can tell apart. In all figures each stands for a kind of method,
and a marker for the method.
"""

WORDS, GREY, PALER, PALE = '#262626', '#4d4d4d', '#8c8c8c', '#c8c8c8'
ORANGE, SKY, GREEN, BLUE, RED, PINK = '#E69F00', '#56B4E9', '#009E73', '#0072B2', '#D55E00', '#CC79A7'
LOOKS = {  # method -> colour of its kind, marker
    'baseline': (GREY, 'o'),
    'longer': (GREY, 'D'),
    'twice': (GREY, 's'),
    'sba': (RED, 'o'),
    'sba_conv': (RED, 'D'),
    'sba_strong': (RED, 's'),
    'cutout_sba': (RED, '^'),
    'ba': (BLUE, 'o'),
    'ba2': (BLUE, 'D'),
    'latent_ba': (BLUE, 's'),
    'cutout': (GREEN, 'o'),
    'cutmix': (GREEN, 'D'),
    'cutout_ba': (GREEN, 's'),
    'cutout_ba2': (GREEN, '^'),
    'mixup': (PINK, 'o'),
    'manifold_mixup': (PINK, 'D'),
    'label_smoothing': (ORANGE, 'o'),
    'r_drop': (ORANGE, 'D'),
    'sam': (SKY, 'o'),
    'ema': (SKY, 'D'),
}
OTHER = ('#000000', '^')
STYLE = {
    'font.family': 'DejaVu Sans',  # comes with matplotlib, so that every machine draws the same
    'font.size': 9.5,
    'axes.titlesize': 9.5,
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.linewidth': 0.7,
    'axes.edgecolor': GREY,
    'xtick.color': GREY,
    'ytick.color': GREY,
    'axes.labelcolor': WORDS,
    'xtick.labelcolor': WORDS,
    'ytick.labelcolor': WORDS,
    'text.color': WORDS,
    'lines.markersize': 5.5,
    'lines.linewidth': 1.3,
}
