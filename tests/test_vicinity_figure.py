"""The figure of the vicinal distribution: its networks learn, and it is reproducible.

Run: pytest tests/test_vicinity_figure.py
"""

from functools import partial

import torch
import torch.nn.functional as F

from composer_sba.study.__main__ import main
from composer_sba.study.vicinity_figure import crescents, draw_vicinity, fit


def test_both_networks_learn_and_sba_is_less_certain():
    points, labels = crescents(60, seed=0)
    certainty = {}
    for eta in (0.0, 1.0):
        logits = fit(points, labels, eta, steps=150)(points).detach()
        loss = F.cross_entropy(logits, labels)
        assert loss < 0.5, f'η = {eta}: {loss:.3f} nats, chance level {torch.tensor(2.0).log():.3f}'
        certainty[eta] = logits.softmax(1).amax(1).mean()
    assert certainty[1.0] < certainty[0.0], certainty


def test_the_figure_is_the_same_each_time(tmp_path):
    first, second = (tmp_path / name for name in ('first.png', 'second.png'))
    lines = draw_vicinity(first, steps=20)
    assert [line.partition(':')[0] for line in lines] == ['without SBA', 'with SBA'], lines
    assert draw_vicinity(second, steps=20) == lines
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 20_000


def test_the_command_writes_to_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('composer_sba.study.vicinity_figure.draw_vicinity', partial(draw_vicinity, steps=1))
    path = tmp_path / 'figures' / 'vicinity.png'
    assert main(['vicinity', '--out', str(path)]) == 0
    assert path.is_file() and capsys.readouterr().out.splitlines()[-1] == str(path)
