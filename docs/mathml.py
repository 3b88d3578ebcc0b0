"""Render equations as MathML, which browsers display without a script or a download."""

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger

LOGGER = getLogger(__name__)


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(_to_mathml(node, block=False))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="equation">{_to_mathml(node, block=True)}</div>\n')
    raise nodes.SkipNode


def _to_mathml(node: nodes.Element, block: bool) -> str:
    try:
        return str(tex2mathml(node.astext(), as_block=block))
    except MathError as error:
        LOGGER.warning('cannot convert the equation %s: %s', node.astext(), error, location=node)
        return ''


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer that ``html_math_renderer = 'mathml'`` selects."""
    app.add_html_math_renderer('mathml', (_inline, None), (_block, None))
    return {'parallel_read_safe': True, 'parallel_write_safe': True}
