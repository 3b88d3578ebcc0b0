"""Open every page of the built site in a headless Chromium, at two widths, light and dark, and report faults.

Run it by hand after ``make docs``: ``pip install playwright``, then ``python docs/check_site.py [--chromium PATH]
[--screenshots DIR]``. The exit code is 1 if there are faults.
"""

import argparse
import functools
import http.server
import itertools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urldefrag

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

SITE = Path(__file__).parent / '_build' / 'html'
WIDTHS = {'desktop': 1280, 'phone': 390}
SCHEMES: tuple[Literal['light', 'dark'], ...] = ('light', 'dark')
# Collects from a page: pictures that did not load, equations without size, links, anchors, code blocks, excess width.
INSPECT = """() => ({
    pictures: [...document.images].filter(each => !(each.complete && each.naturalWidth)).map(each => each.src),
    equations: [...document.querySelectorAll('math')].filter(each => each.getBoundingClientRect().width < 2).length,
    source: [...document.querySelectorAll('.math')].map(each => each.textContent),
    links: [...document.querySelectorAll('a[href]')].map(each => each.href),
    ids: [...document.querySelectorAll('[id]')].map(each => each.id),
    blocks: document.querySelectorAll('div.highlight pre').length,
    buttons: document.querySelectorAll('div.highlight button.copybtn').length,
    wide: document.documentElement.scrollWidth - window.innerWidth,
})"""


def main() -> int:
    """Check the site and print one line per fault."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--chromium', help="path of the browser (default: playwright's own)")
    parser.add_argument(
        '--screenshots', type=Path, metavar='DIR', help='save a screenshot of each page at each width and scheme to DIR'
    )
    arguments = parser.parse_args()
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f'http://127.0.0.1:{server.server_address[1]}/'
        browser = playwright.chromium.launch(executable_path=arguments.chromium)
        pages = [str(path.relative_to(SITE)) for path in sorted(SITE.rglob('*.html')) if '_static' not in path.parts]
        faults = [
            *check_pages(browser, home, pages, arguments.screenshots),
            *check_search(browser, home),
            *check_copy(browser, home),
        ]
        browser.close()
        server.shutdown()
    sizes = ' and '.join(map(str, WIDTHS.values()))
    print(*faults, f'{len(pages)} pages at {sizes} px, {" and ".join(SCHEMES)}: {len(faults)} faults', sep='\n')
    return 1 if faults else 0


class Quiet(http.server.SimpleHTTPRequestHandler):
    """File server that does not log requests."""

    def log_message(self, *args: object) -> None:
        """Discard the message."""


def check_pages(browser: Browser, home: str, pages: list[str], screenshots: Path | None) -> Iterator[str]:
    """Open each page at each width, and yield its faults."""
    ids: dict[str, set[str]] = {}
    links: dict[str, set[str]] = {}
    for width, scheme in itertools.product(WIDTHS, SCHEMES):
        page = browser.new_page(viewport={'width': WIDTHS[width], 'height': 900}, color_scheme=scheme)
        errors = record_errors(page, home)
        for name in pages:
            errors.clear()
            page.goto(home + name)
            page.wait_for_load_state('networkidle')
            for picture in page.locator('img[loading=lazy]').all():
                picture.scroll_into_view_if_needed()
            seen = page.evaluate(INSPECT)
            ids[home + name], links[home + name] = set(seen['ids']), set(seen['links'])
            yield from (f'{name} ({width}): {line}' for line in errors)
            yield from (f'{name} ({width}): picture {picture} did not load' for picture in seen['pictures'])
            if seen['equations'] or any('\\' in source for source in seen['source']):
                yield f'{name} ({width}): {seen["equations"]} equations have no size'
            if seen['wide'] > 0:
                yield f'{name} ({width}): {seen["wide"]} pixels wider than the window'
            if seen['blocks'] != seen['buttons'] and not name.startswith('_modules'):
                yield f'{name} ({width}): {seen["blocks"]} blocks of code, {seen["buttons"]} buttons to copy'
            if screenshots is not None:
                path = screenshots / f'{width}-{scheme}' / f'{name.replace("/", "-")}.png'
                page.screenshot(path=path, full_page=True)
        page.close()
    for name, targets in links.items():
        for target in sorted(targets):
            url, anchor = urldefrag(target)
            if '/_modules/' in name and anchor:
                continue  # Sphinx links from the source to names that a page need not document
            if url.startswith(home) and (url not in ids or (anchor and unquote(anchor) not in ids[url])):
                if not (SITE / url.removeprefix(home)).is_file() or anchor:
                    yield f'{name}: links to {target}, which does not exist'


def record_errors(page: Page, home: str) -> list[str]:
    """Return a list that fills with a page's errors, failed requests and requests to other servers."""
    errors: list[str] = []

    def record(message: ConsoleMessage) -> None:
        # Browsers request favicon.ico from any server if a page names no icon, as Sphinx's source pages do not.
        if message.type == 'error' and not message.location['url'].endswith('/favicon.ico'):
            errors.append(f'{message.text} {message.location["url"]}')

    page.on('console', record)
    page.on('pageerror', lambda error: errors.append(str(error)))
    # The next page ends a request that is under way.
    page.on(
        'requestfailed', lambda each: None if 'ABORTED' in (each.failure or '') else errors.append(f'{each.url} failed')
    )
    page.on('response', lambda reply: errors.append(f'{reply.url}: {reply.status}') if reply.status >= 400 else None)
    page.on('request', lambda request: None if home in request.url else errors.append(f'{request.url}: other server'))
    return errors


def check_search(browser: Browser, home: str) -> Iterator[str]:
    """Search for a term, and yield a fault if its page is not found."""
    page: Page = browser.new_page()
    page.goto(f'{home}search.html?q=cut+layer', wait_until='networkidle')
    page.wait_for_selector('ul.search li', timeout=10_000)
    found = page.locator('ul.search li a').evaluate_all('each => each.map(link => link.href)')
    if not any('own_model' in link for link in found):
        yield f'search for "cut layer" does not find its page, but {found[:10]}'


def check_copy(browser: Browser, home: str) -> Iterator[str]:
    """Copy the first command of the landing page, and yield a fault if its prompt is copied too."""
    context = browser.new_context(permissions=['clipboard-read', 'clipboard-write'])
    page = context.new_page()
    page.goto(home, wait_until='networkidle')
    block = page.locator('div.highlight-console').first
    block.hover()
    block.locator('button.copybtn').click()
    copied = page.evaluate('navigator.clipboard.readText()')
    if not copied or '$' in copied:
        yield f'a command is copied as {copied!r}'


if __name__ == '__main__':
    sys.exit(main())
