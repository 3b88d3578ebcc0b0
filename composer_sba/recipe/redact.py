"""Secrets are hidden in everything that a run writes: recipes next to checkpoints, logs, results and messages."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = '<hidden>'

_OWNED_KEY = '(?:api|access|account|private)[_-]?key(?:_id)?'
_BEGINS = r'(?:^|(?<=[_-])|(?<=[a-z])(?=[A-Z]))'  # a word of a name: API_KEY and apiKey end in "key", MONKEY does not
_SECRETS = f'token|passw(or)?d|passphrase|secret|credentials?|webhook(_url)?|{_OWNED_KEY}'
_KEY = re.compile(rf'{_BEGINS}(?i:{_SECRETS})$')
_VARIABLE = re.compile(rf'((?i:{_SECRETS}|passwd)|{_BEGINS}(?i:key))(?i:_id)?$')
_PASSWORD = re.compile(r'passw(or)?d$|passphrase$', re.IGNORECASE)
_LOGIN = re.compile(r'(://[^/\s:@]*:)[^/\s@]+(?=@)')  # the password in scheme://user:password@host
_PARAMETER = rf'[\w-]*(?:signature|token|credential|password|secret|{_OWNED_KEY})|(?:[\w-]*[_-])?(?:sig|key)'
_SIGNED = re.compile(rf'([?&](?:{_PARAMETER})=)[^&\s]+', re.IGNORECASE)  # what signs a URL
_WORD = r'[A-Z]?[a-z]+(?:[A-Z][a-z]+)*\d{0,4}|[A-Z]+\d{0,4}'
_ORDINARY = re.compile(rf'[~./]*(?:{_WORD})(?:[ _./:-]+(?:{_WORD}|\d{{1,4}}))*/?')  # a word, a name or a path
_LEAST = 8  # characters: shorter values of such variables are switches and names


def redact(values: Any, name: str = '') -> Any:
    """Hide in plain data what looks like a secret.

    The following are hidden:

    - a text or number under a key that says so (``api_key``, ``password``, ``aws_secret``);
    - the password in a URL, and the parameters that sign it;
    - the value of an environment variable whose name ends in the word KEY, TOKEN, SECRET, PASSWORD or the like,
      wherever the value occurs. Values shorter than 8 characters are left, and so are words and paths, unless the
      variable is a password's.

    Args:
        values (Any): Mappings, lists and scalars.
        name (str, optional): The key that ``values`` belongs to. Default: ``''``.

    Returns:
        Any: The same data with ``'<hidden>'`` instead of each secret.

    Example:
        >>> redact({'neptune': {'api_token': 'abc', 'project': 'digits'}})
        {'neptune': {'api_token': '<hidden>', 'project': 'digits'}}
        >>> redact('sftp://me:abc@there/data')
        'sftp://me:<hidden>@there/data'
    """
    if isinstance(values, Mapping):
        return {key: redact(value, str(key)) for key, value in values.items()}
    if isinstance(values, list):
        return [redact(value, name) for value in values]
    if _KEY.search(name) and values not in (None, '') and not isinstance(values, bool):
        return HIDDEN
    if not isinstance(values, str):
        return values
    secrets = [value for name, value in os.environ.items() if _is_secret(name, value)]
    for secret in sorted(secrets, key=len, reverse=True):
        values = values.replace(secret, HIDDEN)
    return _SIGNED.sub(rf'\1{HIDDEN}', _LOGIN.sub(rf'\1{HIDDEN}', values))


def _is_secret(variable: str, value: str) -> bool:
    if len(value) < _LEAST or not _VARIABLE.search(variable):
        return False
    return bool(_PASSWORD.search(variable)) or not (os.path.exists(value) or _ORDINARY.fullmatch(value))
