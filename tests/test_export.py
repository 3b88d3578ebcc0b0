"""The command that exports a trained network: the file, run as its user runs it, against the network; and mistakes.

Run: pytest tests/test_export.py
"""

import hashlib
import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from composer_sba import export as export_module
from composer_sba.data import DatasetConfig
from composer_sba.data.transforms import mean_and_std
from composer_sba.export import TOLERANCE, main
from composer_sba.recipe.build import load_network
from composer_sba.recipe.recipe import load
from composer_sba.train import train


@pytest.fixture(scope='module')
def run(few_digits, tmp_path_factory):
    """Folder of a run of three steps, which give batch normalization its statistics."""
    folder = tmp_path_factory.mktemp('trained') / 'run'
    data = [f'{section}.local={few_digits}' for section in ('train_dataset', 'eval_dataset')]
    train(load('digits_sba.yaml', ['max_duration=3ba', 'progress_bar=false', f'save_folder={folder}', *data]))
    return folder


@pytest.fixture
def checkpoint(run):
    return str(run / 'latest-rank0.pt')


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {'images': images.numpy()})[0]), session.get_modelmeta()


@pytest.mark.parametrize('kind', ['onnx', 'pt2'])
def test_the_file_takes_pixels_and_predicts_what_the_network_does(kind, run, checkpoint, tmp_path, capsys):
    out = tmp_path / 'new' / f'digits.{kind}'
    assert main(['--checkpoint', checkpoint, '--format', kind, '--out', str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == '' and printed.out.endswith(f'network: {out}\n')
    assert float(printed.out.split('at most ')[1].split()[0]) <= TOLERANCE
    network, _ = load_network(load(run / 'recipe.yaml'), Path(checkpoint))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in mean_and_std(DatasetConfig('digits')))
    for rows in (1, 3, 7):
        images = torch.rand(rows, 3, 8, 8)
        if kind == 'onnx':
            logits, meta = run_onnx(out, images)
            metadata = dict(meta.custom_metadata_map)
            metadata['classes'] = json.loads(metadata['classes'])
        else:
            files = {'metadata.json': ''}
            logits = torch.export.load(out, extra_files=files).module()(images)
            metadata = json.loads(files['metadata.json'])
        wanted = network.eval()((images - mean) / std)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=TOLERANCE * wanted.abs().max().item())
    assert metadata['images'] == 'float32, (N, 3, 8, 8), RGB in [0, 1]: normalized inside the network'
    assert metadata['classes'] == list('0123456789')
    assert metadata['checkpoint_sha256'] == hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
    assert [path.name for path in out.parent.iterdir()] == [out.name]


class _Attention(nn.Module):
    def forward(self, images):
        rows = images.flatten(2)[:, None]  # one head
        return nn.functional.scaled_dot_product_attention(rows, rows, rows).mean((1, 2))[:, :10]


@pytest.mark.parametrize('kind', ['onnx', 'pt2'])
def test_attention_takes_batches_of_any_size(kind, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, 'load_network', lambda *arguments: (_Attention(), None))
    assert main(['--checkpoint', checkpoint, '--format', kind, '--out', str(tmp_path / f'a.{kind}')]) == 0


class _DependsOnPixels(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10] * (1 if images.sum() > 0 else 2)


def test_mistakes_are_one_line(run, checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('old.onnx').write_text('kept')
    torch.save({'state': {'model': {}}}, 'other.pt')
    recipe = ['-f', str(run / 'recipe.yaml')]
    given = ['--checkpoint', checkpoint, '--format', 'pt2']

    def refused(arguments, line):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith('error: ') and line in error and error.count('\n') == 1, (arguments, error)
        assert not list(tmp_path.glob('*.partial*')) and not list(tmp_path.glob('*.pt2'))

    refused(['--checkpoint', 'none.pt', *recipe], 'cannot load the checkpoint none.pt: no such file')
    refused(['--checkpoint', 'other.pt', *recipe], 'cannot load the checkpoint other.pt: ')
    refused(['--checkpoint', 'other.pt'], 'recipe.yaml does not exist: name the recipe that was trained, -f FILE')
    refused([*given, 'model.num_classes=4'], 'names 10 classes, the network has 4')
    refused(['--checkpoint', checkpoint, '--out', 'old.onnx'], 'old.onnx exists: pass --overwrite to replace it')
    refused([*given, '--out', 'old.onnx/below.pt2'], 'old.onnx/below.pt2 cannot be written')
    with monkeypatch.context() as patch:
        patch.setitem(export_module.sys.modules, 'onnxruntime', None)
        line = "ONNX needs onnxruntime, which is not installed: pip install 'composer-sba[export]'"
        refused(['--checkpoint', checkpoint, '--out', 'new.onnx'], line)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, 'load_network', lambda *arguments: (_DependsOnPixels(), None))
        refused([*given, '--out', 'new.pt2'], 'digits_net cannot be exported to pt2: ')
    with monkeypatch.context() as patch:
        patch.setattr(
            export_module, '_write_pt2', lambda program, *rest: lambda images: 1.01 * program.module()(images)
        )
        refused(
            [*given, '--out', 'new.pt2'], 'pt2 changes what digits_net predicts: logits differ by 0.01 of the largest'
        )
    with monkeypatch.context() as patch:
        patch.setattr(
            export_module,
            '_write_pt2',
            lambda program, *rest: lambda images: program.module()(images) / (len(images) < 2),
        )
        refused([*given, '--out', 'new.pt2'], 'logits differ by')  # by infinity or NaN, in the second batch
    with monkeypatch.context() as patch:
        patch.setattr('torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD', 0)  # of 1.5 GiB
        line = 'the network is too large for one file of ONNX: use --format pt2'
        refused(['--checkpoint', checkpoint, '--out', 'large.onnx'], line)
        assert not list(tmp_path.glob('large*'))
    monkeypatch.setattr('composer.utils.dist.get_world_size', lambda: 2)
    refused(given, 'export runs in one process')
    assert Path('old.onnx').read_text() == 'kept'
