"""BatchAugmentation, Cutout and MajorityVote compared with their definitions, alone and in Composer's Trainer.

Run: pytest tests/test_baselines.py
"""

import pytest
import torch
import torch.nn.functional as F
from composer import Trainer
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import composer_sba.functional as sbaf
from composer_sba import BatchAugmentation, LatentExpander, MajorityVote, Vicinity
from composer_sba.algorithms.batch_augmentation import Copies, batch_augment
from composer_sba.data.loader import DatasetConfig, build_dataloader
from composer_sba.data.transforms import Cutout
from composer_sba.errors import DatasetError, UserError


class Images(Dataset):
    def __init__(self, transform):
        self.images, self.labels = torch.randn(24, 3, 8, 8), torch.randint(4, (24,))
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


class Net(nn.Sequential):
    """A network that records the number of rows of every forward pass."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return super().forward(x)


def make_trainer(algorithms, **data):
    model = ComposerClassifier(Net(), num_classes=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {'max_duration': '1ep', 'seed': 3, 'device': 'cpu', 'progress_bar': False}
    return Trainer(model=model, optimizers=optimizer, algorithms=algorithms, **data, **options)


def test_copies_are_drawn_independently_and_share_a_label():
    images = torch.stack([Copies(lambda x: x + torch.rand(()), fold=3)(torch.zeros(2)) for _ in range(4)])
    assert images.shape == (4, 3, 2)
    assert len(images[..., 0].unique()) == 12
    inputs, target = batch_augment(images, torch.tensor([0, 1, 2, 3]))
    assert torch.equal(inputs.view(4, 3, 2), images)
    assert target.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize('microbatch', [None, 4])
def test_batch_augmentation_trains_on_all_copies(microbatch):
    loader = DataLoader(Images(lambda x: x + 0.1 * torch.randn(())), 8)
    options = {'device_train_microbatch_size': microbatch} if microbatch else {}
    trainer = make_trainer([BatchAugmentation(fold=3)], train_dataloader=loader, **options)
    trainer.fit()
    assert trainer.state.model.module.rows == ([24] * 3 if microbatch is None else [12] * 6)
    assert trainer.state.timestamp.sample == 24, 'time counts inputs, not copies'
    trainer.fit(duration='1ep')
    assert trainer.state.model.module.rows[-1] == (24 if microbatch is None else 12), 'copies are made once'


def test_one_step_of_batch_augmentation_is_the_mean_over_all_copies():
    dataset = Images(lambda x: x + torch.rand(()))
    trainer = make_trainer([BatchAugmentation(fold=2)], train_dataloader=DataLoader(dataset, 24))
    before = Net()
    before.load_state_dict(trainer.state.model.module.state_dict())
    seen = []
    trainer.state.model.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    trainer.fit()
    loss = F.cross_entropy(before(seen[0]), dataset.labels.repeat_interleave(2))
    loss.backward()
    for old, new in zip(before.parameters(), trainer.state.model.module.parameters(), strict=True):
        assert torch.allclose(old - 0.1 * old.grad, new, atol=1e-6)


def test_streaming_images_are_multiplied_in_the_workers(tmp_path):
    config = DatasetConfig('digits', local=str(tmp_path / 'digits'), num_workers=2, cutout=3)
    loader = build_dataloader(config, 32)
    loader.dataset.transform = Copies(loader.dataset.transform, 4)
    images, labels = next(iter(loader))
    assert images.shape == (32, 4, 3, 8, 8) and labels.shape == (32,)
    assert len({copy.numpy().tobytes() for copy in images[0]}) > 1, 'copies of one image are alike'


def test_a_dataset_without_transform_is_refused():
    loader = DataLoader(TensorDataset(torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)), 4)
    with pytest.raises(UserError, match='^BatchAugmentation applies the transform .* TensorDataset has none'):
        make_trainer([BatchAugmentation()], train_dataloader=loader).fit()


def test_cutout_erases_one_square_clipped_at_the_border():
    counts = torch.zeros(16, 16)
    for _ in range(2000):
        erased = Cutout(6)(torch.ones(3, 16, 16)) == 0
        assert torch.equal(erased[0], erased[1])
        rows, columns = erased[0].any(1).nonzero().flatten(), erased[0].any(0).nonzero().flatten()
        assert 3 <= len(rows) <= 6 and 3 <= len(columns) <= 6
        assert erased[0].sum() == len(rows) * len(columns)
        counts += erased[0]
    centre, corner = counts[8, 8].item() / 2000, counts[0, 0].item() / 2000
    assert centre == pytest.approx(36 / 256, abs=0.03), 'inside, six rows and columns of centres erase a pixel'
    assert corner == pytest.approx(16 / 256, abs=0.03), 'in the corner, four by four'


def test_cutout_of_no_pixels_is_refused():
    with pytest.raises(DatasetError, match='cutout: expected a number of pixels >= 1, got 0'):
        build_dataloader(DatasetConfig('digits', cutout=0), 4)


def test_votes_count_first_and_mean_probability_breaks_ties():
    def logits(*probabilities):
        return torch.tensor(probabilities).log()[:, None]

    majority = sbaf.majority_vote(logits([0.98, 0.01, 0.01], [0.1, 0.5, 0.4], [0.1, 0.5, 0.4]))
    assert majority.argmax().item() == 1, 'two votes beat one, however sure'
    tie = sbaf.majority_vote(logits([0.6, 0.3, 0.1], [0.1, 0.8, 0.1]))
    assert tie.argmax().item() == 1
    assert torch.allclose(majority.exp().sum(-1), torch.ones(1))
    expected = torch.tensor([1 + 1.18 / 3, 2 + 1.01 / 3, 0.81 / 3]) / 4
    assert torch.allclose(majority[0].exp(), expected, atol=1e-6)
    extreme = sbaf.majority_vote(torch.tensor([[[1e4, 0.0]], [[1e4, 0.0]]]))
    assert torch.isfinite(extreme).all(), 'cross-entropy of a class without votes stays finite'
    with pytest.raises(ValueError, match=r'^Expected logits of shape \(1 \+ M, N, K\), got \(3, 2\)'):
        sbaf.majority_vote(torch.zeros(3, 2))


def test_majority_vote_in_evaluation_is_the_vote_over_the_expanders_predictions():
    x, y = torch.randn(10, 3, 8, 8), torch.randint(4, (10,))
    vote = MajorityVote(fold=8, vicinity=Vicinity(sigma=2.0), seed=5)
    trainer = make_trainer([vote], eval_dataloader=DataLoader(TensorDataset(x, y), 5))
    scores = []
    for _ in range(2):
        trainer.eval()
        scores.append(trainer.state.eval_metric_values['CrossEntropy'].item())
    assert scores[0] == scores[1], 'the same votes twice'

    network = trainer.state.model.module.eval()
    expander = LatentExpander(network, fold=8, vicinity=Vicinity(sigma=2.0), seed=5)
    losses = []
    for step, part in enumerate(x.split(5)):
        with expander.armed(step), torch.no_grad():
            raw, virtual = expander.split(network(part))
        losses.append(F.cross_entropy(sbaf.majority_vote(torch.cat([raw[None], virtual])), y.split(5)[step]).item())
    assert scores[0] == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_majority_vote_without_noise_changes_no_decision_and_serves_prediction():
    x, y = torch.randn(10, 3, 8, 8), torch.randint(4, (10,))
    trainer = make_trainer([MajorityVote(vicinity=Vicinity(1.0, sigma=0.0))])
    (voted,) = trainer.predict(DataLoader(TensorDataset(x, y), 10))
    plain = trainer.state.model.module.eval()(x)
    assert torch.equal(voted.argmax(-1), plain.argmax(-1))
    assert torch.allclose(voted.exp().sum(-1), torch.ones(10))


def test_majority_vote_does_not_change_training():
    def final(algorithms):
        torch.manual_seed(0)
        trainer = make_trainer(algorithms, train_dataloader=DataLoader(Images(lambda x: x), 8))
        trainer.fit()
        return torch.cat([parameter.flatten() for parameter in trainer.state.model.parameters()])

    assert torch.equal(final([]), final([MajorityVote()]))
