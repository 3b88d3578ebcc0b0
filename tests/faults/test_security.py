"""What strangers send, and what must not leave: recipes, checkpoints, archives and folders; secrets.

pytest tests/faults/test_security.py
"""

import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from composer_sba import archives
from composer_sba.convert import convert
from composer_sba.convert import main as convert_main
from composer_sba.recipe import load
from composer_sba.redaction import redact
from composer_sba.study.plan import Run
from composer_sba.train import main

# Composer's, of a Trainer that was never finished
pytestmark = pytest.mark.filterwarnings('ignore:Implicitly cleaning up:ResourceWarning')

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / 'yamls' / 'digits_sba.yaml')
SHORT = ['max_duration=1ba', 'eval_subset_num_batches=1', 'progress_bar=false', 'train_dataset.in_memory=true']


def options(digits_folder: Path, *more: str) -> list[str]:
    return ['-f', RECIPE, *SHORT, f'train_dataset.local={digits_folder}', f'eval_dataset.local={digits_folder}', *more]


class Evil:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, ('touch pwned',)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text',
    [
        'seed: !!python/object/apply:os.system ["touch pwned"]\n',
        'callbacks: {x: !!python/object/new:subprocess.Popen [[touch, pwned]]}\n',
        'optimizer: {name: os.system, command: touch pwned}\n',
        'optimizer: {_target_: os.system, command: touch pwned}\n',
        'algorithms: {os.system: {command: touch pwned}}\n',
        'loggers: {subprocess.Popen: {args: [touch, pwned]}}\n',
        'callbacks: {builtins.exec: {}}\n',
        "scheduler: {name: \"__import__('os').system('touch pwned')\"}\n",
        "seed: ${eval:\"__import__('os').system('touch pwned')\"}\n",
        'algorithms: {sba: {augment_prob: {name: os.system, command: touch pwned}}}\n',
        'model: {name: torch.hub.load, num_classes: 10}\n',
    ],
)
def test_a_recipe_runs_no_code(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / 'recipe.yaml').write_text(f'extends: {RECIPE}\n{text}')
    assert main(['-f', 'recipe.yaml', *SHORT, 'save_folder=null']) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r'error: recipe\.yaml: .+\n', said), said
    assert not (tmp_path / 'pwned').exists()


REFUSED = 'expected a whole checkpoint of such a run, got posix.system, which could run code'

# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('how', [['load_weights_only=true'], []])
def test_a_checkpoint_that_would_run_code_is_refused(
    how: list[str], digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({'state': {'model': {}, 'evil': Evil()}, 'rng': []}, tmp_path / 'evil.pt')
    assert main(options(digits_folder, 'save_folder=null', 'load_path=evil.pt', *how)) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(
        'error: command line: load_path: expected a whole checkpoint of such a run, got posix.system, '
    ), line
    assert '\n' not in line and not (tmp_path / 'pwned').exists()


def test_so_is_one_that_a_run_would_resume_from(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'run').mkdir()
    torch.save({'state': Evil()}, tmp_path / 'run' / 'ep0-ba1-rank0.pt')
    assert main(options(digits_folder, 'save_folder=run', 'save_overwrite=false', 'autoresume=true')) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f'save_folder: {REFUSED}' in line, line
    assert not (tmp_path / 'pwned').exists()


def test_what_runs_save_is_plain_data(digits_folder: Path, tmp_path: Path) -> None:
    more = ['algorithms.ema={}', 'algorithms.mixup={}', 'callbacks={speed_monitor: {}, last_epochs_median: {}}']
    assert main(options(digits_folder, 'save_folder=run', *more)) == 0
    assert (
        main(options(digits_folder, 'save_folder=null', 'max_duration=2ba', 'load_path=run/latest-rank0.pt', *more))
        == 0
    )
    found = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / 'run' / 'latest-rank0.pt')
    assert all(re.match(r'(numpy|datetime|torch)\b', name) for name in found), found


def test_who_trusts_it_may_load_it(digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(options(digits_folder, 'save_folder=run')) == 0
    path = tmp_path / 'run' / 'latest-rank0.pt'
    torch.save(torch.load(path, weights_only=False) | {'evil': Evil()}, path)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    assert main(options(digits_folder, 'save_folder=null', f'load_path={path}', 'load_weights_only=true')) == 0
    assert (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('damage', ['cut', 'flipped', 'empty', 'gone', 'other'])
def test_a_checkpoint_that_cannot_be_read_is_named(
    damage: str, digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options(digits_folder, 'save_folder=run')) == 0
    whole = (tmp_path / 'run' / 'latest-rank0.pt').read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    torch.save({'state': {'model': {'head.weight': torch.zeros(3)}}}, 'other.pt')
    content = {'cut': whole[:-100], 'flipped': bytes(flipped), 'empty': b'', 'other': Path('other.pt').read_bytes()}
    if damage != 'gone':
        (tmp_path / 'bad.pt').write_bytes(content[damage])
    capsys.readouterr()
    assert main(options(digits_folder, 'save_folder=null', 'load_path=bad.pt', 'load_weights_only=true')) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith('error: command line: load_path: expected a whole checkpoint') and '\n' not in line, line


# --- secrets ----------------------------------------------------------------------------------------------------------

SECRETS = {'AWS_SECRET_ACCESS_KEY': 'wJalrXUtnFEMIsecret', 'WANDB_API_KEY': '0123456789abcdefwandb'}


def test_secrets_stay_out_of_all_that_a_run_writes(
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
    said = capsys.readouterr()
    written = {str(path): path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    written |= {'stderr': said.err.encode()}
    recipe = (tmp_path / 'run' / 'recipe.yaml').read_text()
    assert 'run_name: x-<hidden>' in recipe and 'a?sig=<hidden>' in recipe, recipe
    for secret in ('hunter2hunter2', SECRETS['AWS_SECRET_ACCESS_KEY']):
        assert [place for place, content in written.items() if secret.encode() in content] == []


def test_a_message_hides_the_password_of_a_remote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote = 'ftp://me:hunter2hunter2@localhost/data?token=hunter2hunter2'
    assert (
        main(
            [
                '-f',
                RECIPE,
                *SHORT,
                'train_dataset.in_memory=false',
                'save_folder=null',
                f'train_dataset.remote={remote}',
            ]
        )
        == 2
    )
    line = capsys.readouterr().err
    assert 'ftp://me:<hidden>@localhost' in line and 'hunter2' not in line, line


def test_a_recipe_that_was_saved_without_its_secret_asks_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'recipe.yaml').write_text(
        f'extends: {RECIPE}\nloggers: {{slack: {{slack_logging_api_key: <hidden>}}}}\n'
    )
    assert main(['-f', 'recipe.yaml']) == 2
    assert (
        'loggers.slack.slack_logging_api_key: expected the secret in the place of <hidden>' in capsys.readouterr().err
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


def test_results_of_a_study_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the record of a finished run has them: without loggers and places, and redacted."""
    monkeypatch.setenv('MY_TOKEN', 'hunter2hunter2')
    keys = ['train_dataset.remote=s3://me:hunter2hunter2@bucket', 'loggers.slack.channel_id=hunter2hunter2']
    recipe = load(RECIPE, [*keys, 'callbacks.checkpoint_saver.folder=s3://hunter2hunter2/x'])
    run = Run('rivals', 'digits', 'digits', 'sba', {}, recipe)
    assert 'hunter2' in json.dumps(recipe.to_dict())
    assert 'hunter2' not in json.dumps(redact(run.facts)), run.facts


# --- archives and folders ---------------------------------------------------------------------------------------------


def image_folder(root: Path) -> Path:
    for split in ('train', 'val'):
        for name in ('ant', 'bee'):
            (root / split / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(root / split / name / '0.png')
    return root


def tar_with(root: Path, **member: Any) -> Path:
    image_folder(root / 'images')
    with tarfile.open(root / 'evil.tar', 'w') as tar:
        tar.add(root / 'images', '.')
        info = tarfile.TarInfo(member.pop('name'))
        for key, value in member.items():
            setattr(info, key, value)
        tar.addfile(info, io.BytesIO(b'x' * info.size))
    return root / 'evil.tar'


def zip_with(root: Path, name: str, content: bytes) -> Path:
    image_folder(root / 'images')
    with zipfile.ZipFile(root / 'evil.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
        for path in (root / 'images').rglob('*.png'):
            archive.write(path, path.relative_to(root / 'images'))
        archive.writestr(name, content)
    return root / 'evil.zip'


def tar_bomb(root: Path) -> Path:
    with tarfile.open(root / 'bomb.tar.gz', 'w:gz') as tar:
        info = tarfile.TarInfo('train/ant/0.png')
        info.size = 30 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    return root / 'bomb.tar.gz'


def image_bomb(root: Path) -> Path:
    Image.new('1', (20_000, 20_000)).save(image_folder(root / 'images') / 'train' / 'ant' / '1.png')
    return root / 'images'


def linked(root: Path, place: str, target: str) -> Path:
    (root / 'private').mkdir()
    Image.new('RGB', (8, 8)).save(root / 'private' / 'secret.png')
    (image_folder(root / 'images') / place).symlink_to(target)
    return root / 'images'


IN = {'name': 'train/ant/1.png'}


@pytest.mark.parametrize(
    ('make', 'what', 'message'),
    [
        (tar_with, {'name': '../../../evil', 'size': 4}, 'evil.tar: cannot be unpacked .*outside the destination'),
        (tar_with, {**IN, 'type': tarfile.SYMTYPE, 'linkname': '/etc/passwd'}, "the link .* to '/etc/passwd'"),
        (tar_with, {**IN, 'type': tarfile.SYMTYPE, 'linkname': '../../../../x'}, 'evil.tar: .* the link .*1.png'),
        (tar_with, {**IN, 'type': tarfile.LNKTYPE, 'linkname': '../../../x'}, 'evil.tar: expected files, got the link'),
        (tar_with, {**IN, 'type': tarfile.CHRTYPE}, 'special file'),
        (zip_with, {'name': '../../evil', 'content': b'x'}, r"evil.zip: .* got the path '../../evil'"),
        (zip_with, {'name': '/evil', 'content': b'x'}, r"evil.zip: .* got the path '/evil'"),
        (zip_with, {**IN, 'content': bytes(30 << 20)}, 'evil.zip: expected at most 100 times its .* bytes, got 31,'),
        (tar_bomb, {}, 'bomb.tar.gz: expected at most 100 times its .* bytes, got 31,457,280 and more: no archive'),
        (image_bomb, {}, r'train/ant/1.png: not an image that can be read \(Image size .* exceeds limit'),
        (linked, {'place': 'train/ant/l.png', 'target': '../../../private/secret.png'}, 'l.png is a link out of'),
        (linked, {'place': 'train/ant/more', 'target': '../../../private'}, 'more is a link out of'),
        (linked, {'place': 'train/ant/loop.png', 'target': 'loop.png'}, 'loop.png is a link that leads nowhere'),
    ],
)  # fmt: skip
def test_a_hostile_source_is_refused_and_leaves_nothing(
    make: Callable[..., Path], what: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(archives, 'SMALL', 1 << 20)
    (tmp_path / 'source').mkdir()
    source = make(tmp_path / 'source', **what)
    assert convert_main(['imagefolder', '--source', str(source), '--out', 'out']) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, lines[-1]) and 'Traceback' not in ''.join(lines), lines
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != '.lock') == ['source']
    assert not list(tmp_path.parent.glob('evil')), 'something was written outside'


def test_an_archive_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = zip_with(tmp_path, 'train/ant/1.png', os.urandom(1 << 20))
    monkeypatch.setattr(archives.shutil, 'disk_usage', lambda path: SimpleNamespace(free=1000))
    assert convert_main(['imagefolder', '--source', str(archive), '--out', 'out']) == 2
    assert 'evil.zip: needs more than the 1,000 bytes that are free: make room' in capsys.readouterr().err


def test_links_within_a_folder_are_followed(tmp_path: Path) -> None:
    source = image_folder(tmp_path / 'images')
    (source / 'train' / 'ant' / '1.png').symlink_to('0.png')
    assert convert('imagefolder', source, tmp_path / 'out') == {'train': 3, 'val': 2}
