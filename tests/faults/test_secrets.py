"""Secrets stay out of recipes, logs, messages and results.

pytest tests/faults/test_secrets.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
from short_digits import RECIPE, SHORT, options

from composer_sba.recipe.recipe import load, save, to_yaml
from composer_sba.recipe.redact import redact
from composer_sba.study.plan import Run
from composer_sba.train import main

# Composer's, of a Trainer that was never finished
pytestmark = [
    pytest.mark.usefixtures('in_tmp_path'),
    pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning'),
]

SECRETS = {'AWS_SECRET_ACCESS_KEY': 'wJalrXUtnFEMIsecret', 'WANDB_API_KEY': '0123456789abcdefwandb'}


def test_secrets_stay_out_of_everything_that_a_run_writes(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    more = [
        'loggers={file: {filename: log.txt}, tensorboard: {log_dir: tb}}',
        'save_folder=run',
        'console_log_interval=1ba',
    ]
    more += ['run_name=x-${oc.env:WANDB_API_KEY}', 'log_to_console=true', 'load_ignore_keys=["a?sig=hunter2hunter2"]']
    assert main(options(digits_folder, *more)) == 0
    assert main(options(digits_folder, *more, '--dry-run')) == 0
    output = capsys.readouterr()
    written = {str(path): path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    written |= {'stderr': output.err.encode()}
    recipe = (tmp_path / 'run' / 'recipe.yaml').read_text()
    assert 'run_name: x-<hidden>' in recipe and 'a?sig=<hidden>' in recipe, recipe
    for secret in ('hunter2hunter2', SECRETS['AWS_SECRET_ACCESS_KEY']):
        assert [path for path, content in written.items() if secret.encode() in content] == []


def test_a_message_hides_the_password_of_a_remote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote = 'ftp://me:hunter2hunter2@localhost/data?token=hunter2hunter2'
    keys = ['train_dataset.in_memory=false', 'save_folder=null', f'train_dataset.remote={remote}']
    assert main(['-f', RECIPE, *SHORT, *keys]) == 2
    line = capsys.readouterr().err
    assert 'ftp://me:<hidden>@localhost' in line and 'hunter2' not in line, line


def test_a_recipe_that_was_saved_without_its_secret_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'recipe.yaml').write_text(
        f'extends: {RECIPE}\nloggers: {{slack: {{slack_logging_api_key: <hidden>}}}}\n'
    )
    assert main(['-f', 'recipe.yaml']) == 2
    line = capsys.readouterr().err
    assert 'loggers.slack.slack_logging_api_key: holds <hidden> instead of the secret, which is never saved' in line, (
        line
    )


@pytest.mark.parametrize(
    ('values', 'hidden'),
    [
        (
            {'api_key': 'a', 'apikey': 'b', 'neptune_api_token': 'c'},
            {'api_key': 1, 'apikey': 1, 'neptune_api_token': 1},
        ),
        ({'input_key': 0, 'target_key': 'y', 'tokens': 'abc', 'keys': ['a']}, set()),
        ({'password': '', 'token': None, 'secret': True, 'depth': 5, 'monkey': 'x', 'MAX_KEY': 1}, set()),
        ({'password': 12345678, 'apiToken': 'a', 'secretAccessKey': 'b'}, {'password', 'apiToken', 'secretAccessKey'}),
    ],
)
def test_keys_that_name_a_secret(values: dict[str, Any], hidden: set[str]) -> None:
    assert redact(values) == {key: '<hidden>' if key in hidden else value for key, value in values.items()}


@pytest.mark.parametrize(
    ('variable', 'value', 'is_secret'),
    [
        ('WANDB_API_KEY', 'a1b2c3d4e5', True),
        ('OPENAI_APIKEY', 'sk-proj-a1b2c3D4', True),
        ('AWS_SECRET_ACCESS_KEY', 'wJalrXUtnFEMIsecret', True),
        ('AWS_ACCESS_KEY_ID', 'AKIAIOSFODNN7EXAMPLE', True),
        ('KEY', 'a1b2c3d4e5', True),
        ('apiKey', 'a1b2c3d4e5', True),
        ('GITHUB_TOKEN', 'ghp_16C7e42F292c6912E7710c838347Ae178B4a', True),
        ('PGPASSWORD', 'correcthorse', True),  # a password may be a word
        ('DB_PASSPHRASE', 'correct horse battery', True),
        ('MONKEY', 'a1b2c3d4e5', False),  # not the word KEY
        ('TURKEY', 'a1b2c3d4e5', False),
        ('TOKENIZER', 'a1b2c3d4e5', False),
        ('KEYBOARD', 'a1b2c3d4e5', False),
        ('SSH_KEY', '/home/me/.ssh/id_rsa', False),  # a path
        ('DATA_KEY', '~/data/cifar100', False),
        ('BUCKET_KEY', 's3://bucket/data/cifar10', False),
        ('SORT_KEY', 'MulticlassAccuracy', False),  # words
        ('PARTITION_KEY', 'resnet44_cifar10_baseline', False),
        ('GOOGLE_APPLICATION_CREDENTIALS', '/etc/google/key.json', False),
        ('API_KEY', 'a1b2c3d', False),  # short
    ],
)
def test_variables_that_hold_a_secret(
    variable: str, value: str, is_secret: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert redact({'local': f'{value}/train'}) == {'local': '<hidden>/train' if is_secret else f'{value}/train'}


@pytest.mark.parametrize('variable', ['MONKEY', 'DATA_KEY', 'HOME'])
def test_a_recipe_that_holds_the_value_of_a_variable_is_read_back(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'digits').mkdir()
    monkeypatch.setenv(variable, str(tmp_path / 'digits'))
    recipe = load(RECIPE, [f'train_dataset.local=${{oc.env:{variable}}}/mds'])
    save(recipe, tmp_path / 'recipe.yaml')
    again = load(tmp_path / 'recipe.yaml')
    assert to_yaml(again) == to_yaml(recipe)
    assert again.train_dataset['local'] == recipe.train_dataset['local'] == f'{tmp_path}/digits/mds'


@pytest.mark.parametrize(
    ('parameter', 'is_secret'),
    [
        *(('sig', True), ('X-Amz-Signature', True), ('X-Amz-Security-Token', True), ('apiKey', True), ('key', True)),
        *(('monkey', False), ('design', False), ('tokens', False), ('hotkey', False), ('partition', False)),
    ],
)
def test_parameters_that_sign_a_url(parameter: str, is_secret: bool) -> None:
    url = f's3://bucket/data?{parameter}='
    assert redact(f'{url}abc') == url + ('<hidden>' if is_secret else 'abc')


def test_results_of_a_study_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the record of a finished run has them: without loggers and places, and redacted."""
    monkeypatch.setenv('MY_TOKEN', 'hunter2hunter2')
    keys = ['train_dataset.remote=s3://me:hunter2hunter2@bucket', 'loggers.slack.channel_id=hunter2hunter2']
    recipe = load(RECIPE, [*keys, 'callbacks.checkpoint_saver.folder=s3://hunter2hunter2/x'])
    run = Run('methods', 'digits', 'digits', 'sba', {}, recipe)
    assert 'hunter2' in json.dumps(recipe.to_dict())
    assert 'hunter2' not in json.dumps(redact(run.facts)), run.facts
