"""Secrets stay out of what a run writes: recipes beside checkpoints, logs, results and messages."""

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = '<hidden>'

_NAMES = ('api_?key', 'token', 'passw(or)?d', 'passphrase', 'secret', 'credentials?', 'webhook(_url)?')
_NAME = rf'({"|".join(_NAMES)}|(access|private|account)_?key(_?id)?)'
_KEY = re.compile(rf'(^|_|(?<=[a-z])(?=[A-Z]))(?i:{_NAME})$')
_LOGIN = re.compile(r'(://[^/\s:@]*:)[^/\s@]+(?=@)')  # the password in scheme://user:password@host
_SIGNED = re.compile(r'([?&][\w-]*(?:signature|sig|token|credential|password|secret|key)=)[^&\s]+', re.IGNORECASE)
_VARIABLE = re.compile(r'(KEY|TOKEN|SECRET|PASSWORD|PASSWD)(_ID)?$', re.IGNORECASE)
_LEAST = 8  # characters: shorter values of such variables are switches and names


def redact(values: Any, name: str = '') -> Any:
    """Hide what looks like a secret in plain data.

    That is a text or number whose key says so (``api_key``, ``password``, ``aws_secret``), the password in a URL and
    what signs it, and the value of an environment variable whose name ends in KEY, TOKEN, SECRET or PASSWORD, wherever
    it occurs.

    Args:
        values (Any): Mappings, lists and scalars.
        name (str, optional): The key that ``values`` belongs to. Default: ``''``.

    Returns:
        Any: The same with ``'<hidden>'`` in place of secrets.

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
    secrets = [value for key, value in os.environ.items() if _VARIABLE.search(key) and len(value) >= _LEAST]
    for secret in sorted(secrets, key=len, reverse=True):
        values = values.replace(secret, HIDDEN)
    return _SIGNED.sub(rf'\1{HIDDEN}', _LOGIN.sub(rf'\1{HIDDEN}', values))
