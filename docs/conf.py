"""Configuration of the Sphinx site: ``make docs`` builds it."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

project = 'composer-sba'
author = 'The composer-sba authors'
version = release = installed('composer-sba')

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
html_title = 'composer-sba'
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False  # the licence says it

copybutton_prompt_text = r'\$ |>>> |\.\.\. '
copybutton_prompt_is_regexp = True
