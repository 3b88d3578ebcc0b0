"""Configuration of the Sphinx site: ``make docs`` builds it."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

from composer import Algorithm
from docutils import nodes

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

project = 'composer-sba'
author = 'The composer-sba authors'
version = release = installed('composer-sba')
REPOSITORY = 'https://github.com/composer-sba/composer-sba/'

extensions = [
    'myst_nb',  # Markdown pages and a notebook, which runs during the build
    'sphinx.ext.autodoc',  # builds the reference from docstrings
    'sphinx.ext.napoleon',  # reads Google-style docstrings
    'mathml',  # docs/mathml.py
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']

nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = 'remove'  # warnings of libraries, with paths of the machine that builds the site

myst_enable_extensions = ['attrs_inline', 'colon_fence', 'deflist', 'dollarmath', 'substitution']
myst_heading_anchors = 3
# `python -m composer_sba.study report` writes the results page; a checkout without results does not have it.
myst_substitutions = {'results': '[results](/results.md)' if (DOCS / 'results.md').exists() else 'results'}

autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # the docstrings give the types
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # otherwise dataclass fields are described twice

nitpicky = True  # an unresolved name in a docstring fails the build
nitpick_ignore_regex = [  # names of other libraries, and words that are not types
    (
        r'py:.*',
        r'(torch|torchvision|transformers|composer|numpy|np|streaming|rich|PIL|omegaconf|pathlib|collections)\..*',
    ),
    (r'py:.*', r'(nn|F|dist|transforms)\..*'),
    (r'py:class', r'optional|[a-z]+'),
    (r'py:class', r'(Any|Callable|Mapping|Path|Sequence|Table|Time|ComposerClassifier|LoggerDestination|State)'),
    (r'py:class', r'(Noise|Trainer)'),  # Noise is internal to the package
]

html_math_renderer = 'mathml'
html_theme = 'furo'
html_title = f'composer-sba {version}'
html_theme_options = {
    'source_repository': REPOSITORY,  # links each page to its source
    'source_branch': 'main',
    'source_directory': 'docs/',
    'footer_icons': [{'name': 'Repository', 'url': REPOSITORY, 'html': f'Repository · version {version}', 'class': ''}],
}
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False  # the licence says it

copybutton_prompt_text = r'\$ |>>> |\.\.\. '
copybutton_prompt_is_regexp = True


def keep_numbers_together(app, doctree):
    """Put no-break spaces into '39.4 ± 0.2 %' and '[−1.17, +0.51]'."""
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, nodes.literal | nodes.literal_block | nodes.math | nodes.raw | nodes.comment):
            kept = re.sub(r'(?<=[\d)]) (?=[±%])|(?<=±) |(?<=\d,) (?=[+−\d.]+\])', '\u00a0', text)
            if kept != text:
                text.parent.replace(text, nodes.Text(kept))


def drop_module_docstring(app, what, name, obj, options, lines):
    """The reference has an introduction of its own on each page."""
    if what == 'module':
        lines.clear()


def skip_hooks(app, what, name, obj, skip, options):
    """Leave out what Composer or PyTorch calls: the events of a callback, match, apply and forward."""
    return True if what == 'class' and (hasattr(Algorithm, name) or name == 'forward') else None


def setup(app):
    """Register the functions above."""
    app.connect('doctree-read', keep_numbers_together)
    app.connect('autodoc-process-docstring', drop_module_docstring)
    app.connect('autodoc-skip-member', skip_hooks)
