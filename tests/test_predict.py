"""The command that classifies images: against the network itself, on odd files, and its mistakes.

Run: pytest tests/test_predict.py
"""

import csv
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from composer_sba.arguments import predict_parser
from composer_sba.data import DatasetConfig, convert, transform
from composer_sba.errors import UserError
from composer_sba.predict import image_files, main, predict
from composer_sba.recipe.build import load_network
from composer_sba.recipe.recipe import load
from composer_sba.train import main as train_main
from composer_sba.trained import new_file
from conversions import image_folder, picture

CLASSES = ('ant', 'bee', 'cat')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A folder with images, their dataset and a run on it: source/, images/, run/ with a checkpoint."""
    folder = tmp_path_factory.mktemp('trained')
    convert('imagefolder', image_folder(folder / 'source', CLASSES), folder / 'images')
    source = f'{{name: imagefolder, local: {folder}/images, crop_size: 8, resize_size: 9, num_workers: 0}}'
    datasets = [f'train_dataset={source}', f'eval_dataset={source}', 'eval_dataset.split=val', 'model.num_classes=3']
    options = ['max_duration=3ba', 'global_train_batch_size=8', 'progress_bar=false', f'save_folder={folder}/run']
    assert train_main(['-f', 'digits_baseline.yaml', *datasets, *options]) == 0
    return folder


def test_a_tilde_is_the_home_folder(monkeypatch):
    """A shell expands it only at the start of a word, not in ``--out=~/file``."""
    monkeypatch.setenv('HOME', '/home/someone')
    given = predict_parser().parse_intermixed_args(['--checkpoint=~/a.pt', '--out=~/p.csv', '~/images'])
    assert (given.checkpoint, given.out) == (Path('/home/someone/a.pt'), Path('/home/someone/p.csv'))


def test_only_its_own_failure_is_blamed_on_the_output(tmp_path):
    for problem, line in [
        (OSError(errno.ENOMEM, 'Cannot allocate memory'), r'^\[Errno 12\] Cannot allocate memory$'),
        (OSError(errno.ENOSPC, 'No space left on device'), 'p.csv cannot be written .No space left on device.: choose'),
    ]:
        with pytest.raises(UserError, match=line), new_file(tmp_path / 'p.csv', overwrite=False):
            raise problem


@pytest.fixture
def checkpoint(run):
    return str(run / 'run' / 'latest-rank0.pt')


def read(path):
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('workers', [0, 2])
def test_the_file_has_what_the_network_says_of_each_image(workers, run, checkpoint, tmp_path, capsys):
    """Images of seven formats and modes, one at a time, against batches of eight."""
    out = tmp_path / 'new' / 'predictions.csv'
    command = ['--checkpoint', checkpoint, '--out', str(out), '--top', '2', str(run / 'source' / 'val')]
    assert main([*command, f'eval_dataset.num_workers={workers}', 'device_eval_batch_size=8']) == 0
    network, _ = load_network(load(run / 'run' / 'recipe.yaml'), Path(checkpoint))
    network.eval()
    images = transform(DatasetConfig('imagefolder', f'{run}/images', split='val', crop_size=8, resize_size=9))
    rows = read(out)
    assert [row['image'] for row in rows] == sorted(
        f'{name}/0{path.name[1:]}' for name in CLASSES for path in (run / 'source' / 'val' / name).iterdir()
    )
    for row in rows:
        assert list(row) == ['image', 'class_1', 'probability_1', 'class_2', 'probability_2', 'problem']
        batch = images(Image.open(run / 'source' / 'val' / row['image']))[None]
        chances, labels = network(batch).softmax(1)[0].topk(2)
        assert [row['class_1'], row['class_2']] == [CLASSES[label] for label in labels], row
        assert [float(row['probability_1']), float(row['probability_2'])] == pytest.approx(chances.tolist(), abs=2e-6)
    printed = capsys.readouterr()
    assert printed.out == f'predictions of 21 images: {out}\n'
    assert printed.err == ''


def test_files_that_are_no_images_have_a_line_that_says_why(run, checkpoint, tmp_path, capsys):
    folder = tmp_path / 'photos'
    (folder / 'below').mkdir(parents=True)
    for name in ('.hidden.png', 'below/good.png', 'good.jpg', b'caf\xe9.png'.decode(errors='surrogateescape')):
        picture().save(folder / name)
    (folder / 'notes.txt').write_text('no image')
    whole = (folder / 'good.jpg').read_bytes()
    (folder / 'short.jpg').write_bytes(whole[: len(whole) // 2])
    out = tmp_path / 'predictions.csv'
    assert main(['--checkpoint', checkpoint, '--out', str(out), str(folder)]) == 0
    rows = {row['image']: row for row in read(out)}
    assert set(rows) == {'below/good.png', 'good.jpg', 'caf\udce9.png', 'notes.txt', 'short.jpg'}
    assert {name for name, row in rows.items() if row['problem']} == {'notes.txt', 'short.jpg'}
    assert rows['notes.txt'] | {'problem': ''} == {key: '' for key in rows['notes.txt']} | {'image': 'notes.txt'}
    assert rows['notes.txt']['problem'] == 'cannot identify image file'
    assert 'truncated' in rows['short.jpg']['problem'].lower()
    assert rows['good.jpg']['class_3'] and 'class_4' not in rows['good.jpg'], 'the network has three classes'
    error = capsys.readouterr().err
    assert error.startswith('2 of 5 files cannot be classified: notes.txt (cannot identify image file), short.jpg (')
    assert error.count('\n') == 1


def test_a_network_of_one_size_takes_no_other(digits_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ['max_duration=1ba', 'progress_bar=false', 'save_folder=run']
    local = [f'{section}.local={digits_folder}' for section in ('train_dataset', 'eval_dataset')]
    assert train_main(['-f', 'digits_baseline.yaml', *options, *local]) == 0
    Path('images').mkdir()
    picture(size=(8, 8)).save('images/a.png')
    picture(size=(12, 10)).save('images/b.png')
    assert main(['--checkpoint', 'run/latest-rank0.pt', 'images', 'eval_dataset=null']) == 0
    right, wrong = read('run/predictions.csv')
    assert right['class_1'] in '0123456789' and not right['problem']
    assert wrong['problem'] == '12x10 pixels, the network takes 8x8' and not wrong['class_1']
    capsys.readouterr()
    assert main(['--checkpoint', 'run/latest-rank0.pt', 'images/b.png', '--overwrite']) == 2
    assert 'images/b.png has no image that can be classified: b.png (12x10 pixels' in capsys.readouterr().err
    assert len(read('run/predictions.csv')) == 2, 'the file of the first call is lost'


def test_a_run_needs_its_dataset_no_more(run, checkpoint, tmp_path, capsys):
    """It keeps names of classes and statistics; a run of an earlier version does not."""
    source = str(run / 'source' / 'val')
    assert main(['--checkpoint', checkpoint, '--out', str(tmp_path / 'here.csv'), source]) == 0
    moved = shutil.copytree(run / 'run', tmp_path / 'moved', symlinks=True) / 'latest-rank0.pt'
    elsewhere = ['eval_dataset.local=nowhere', 'train_dataset.local=nowhere']
    command = ['--checkpoint', str(moved), '--out', str(tmp_path / 'there.csv'), '--overwrite', source, *elsewhere]
    assert main(command) == 0
    assert read(tmp_path / 'there.csv') == read(tmp_path / 'here.csv')
    capsys.readouterr()
    (moved.parent / 'dataset.json').write_text('{')
    assert main(command) == 2
    assert 'moved/dataset.json cannot be read' in capsys.readouterr().err
    (moved.parent / 'dataset.json').unlink()
    assert main(command) == 2
    assert 'nowhere does not exist' in capsys.readouterr().err
    statistics = json.loads((run / 'run' / 'dataset.json').read_text())
    assert main([*command, *(f'eval_dataset.{key}={statistics[key]}' for key in ('mean', 'std'))]) == 0
    assert capsys.readouterr().err.startswith('The classes are numbers: nowhere does not exist')
    numbers = {name: str(label) for label, name in enumerate(CLASSES)}
    for here, there in zip(read(tmp_path / 'here.csv'), read(tmp_path / 'there.csv'), strict=True):
        assert there == {key: numbers.get(value, value) for key, value in here.items()}


def test_an_interrupted_prediction_leaves_no_file(run, checkpoint, tmp_path, monkeypatch):
    def stopped(*arguments):
        yield from list(predict(*arguments))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr('composer_sba.predict.predict', stopped)
    with pytest.raises(KeyboardInterrupt):
        main(['--checkpoint', checkpoint, '--out', str(tmp_path / 'out' / 'p.csv'), str(run / 'source' / 'val')])
    assert list((tmp_path / 'out').iterdir()) == []


def test_hidden_folders_and_those_of_a_system_are_left_out(tmp_path):
    for name in ('b/1.png', 'a/2.png', '.git/3.png', '__MACOSX/4.png', 'b/@eaDir/5.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert image_files(tmp_path) == [tmp_path / 'a' / '2.png', tmp_path / 'b' / '1.png']
    assert image_files(tmp_path / 'b' / '1.png') == [tmp_path / 'b' / '1.png']


def test_mistakes_are_one_line(run, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save('image.png')
    Path('empty').mkdir()
    Path('text').mkdir()
    Path('text/notes.txt').write_text('no image')
    Path('old.csv').write_text('kept')
    torch.save({'state': {'model': {}}}, 'other.pt')
    *names, first, _ = torch.load(checkpoint, weights_only=False)['state']['model']
    other = {name: torch.zeros(3) for name in (*names, 'module.a', 'module.b')}
    torch.save({'state': {'model': other}}, 'wide.pt')
    recipe = ['-f', str(run / 'run' / 'recipe.yaml')]
    for arguments, line in [
        (['--checkpoint', 'none.pt', *recipe, 'image.png'], 'cannot load the checkpoint none.pt: no such file'),
        (['--checkpoint', 'other.pt', *recipe, 'image.png'], 'cannot load the checkpoint other.pt: '),
        (['--checkpoint', 'wide.pt', *recipe, 'image.png'], f'Missing key(s) in state_dict: "{first}" and 1 more.'),
        (['--checkpoint', 'wide.pt', *recipe, 'image.png'], 'Unexpected key(s) in state_dict: "module.a" and 1 more.'),
        (['--checkpoint', 'wide.pt', *recipe, 'image.png'], 'size mismatch for module.conv1.0.weight: copying a param'),
        (['--checkpoint', 'wide.pt', *recipe, 'image.png'], ' more; it is corrupt or belongs to a different model'),
        (['--checkpoint', 'old.csv', *recipe, 'image.png'], 'old.csv: it is not a PyTorch checkpoint, or it is'),
        (['--checkpoint', 'empty', 'image.png'], 'empty is a folder: name a checkpoint in it'),
        (['--checkpoint', 'other.pt', 'image.png'], 'recipe.yaml does not exist: name the recipe that was trained'),
        (['--checkpoint', checkpoint, 'image.png', 'model.num_classes=4'], 'names 3 classes, the network has 4'),
        (['--checkpoint', checkpoint, '--out', 'p.csv', 'image.png', 'model.dropout=x'], 'model.dropout'),
        (['--checkpoint', checkpoint, 'nowhere'], 'nowhere does not exist: give a folder of images'),
        (['--checkpoint', checkpoint, 'empty'], 'empty has no files: give a folder of images'),
        (['--checkpoint', checkpoint, 'text'], 'text has no image that can be classified: notes.txt (cannot identify'),
        (['--checkpoint', checkpoint, '--out', 'image.png/p.csv', 'image.png'], 'image.png/p.csv cannot be written'),
        (['--checkpoint', checkpoint, '--out', 'old.csv', 'image.png'], 'old.csv exists: pass --overwrite'),
        (['--checkpoint', checkpoint, '--top', '0', 'image.png'], '--top: expected a number of classes >= 1, got 0'),
        (['--checkpoint', 'other.pt', *recipe, 'image.png', 'eval_dataset.local=none'], 'eval_dataset: none does not'),
    ]:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith('error: ') and line in error and error.count('\n') == 1, (arguments, error)
        assert len(error) < 600, error
    assert Path('old.csv').read_text() == 'kept'
    assert not (run / 'run' / 'predictions.csv').exists() and not list(tmp_path.glob('*.partial*'))
    monkeypatch.setattr('composer.utils.dist.get_world_size', lambda: 2)
    assert main(['--checkpoint', checkpoint, 'image.png']) == 2
    assert capsys.readouterr().err.startswith('error: predict runs in one process')
