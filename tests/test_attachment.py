"""What the algorithms attach to a Trainer is removed whichever way a fit or an evaluation ends.

Run: pytest tests/test_attachment.py
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from composer.core import Callback
from composer.models import ComposerClassifier
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from composer_sba import SBA, BatchAugmentation, MajorityVote, Vicinity
from composer_sba.algorithms import ManifoldMixup, RDrop
from composer_sba.errors import UserError
from small_training import logged, trainer_of

# Composer's, about mixed labels whose sum is rounded below 1
pytestmark = pytest.mark.filterwarnings('ignore:Some targets have less than 1 total probability')
ROWS, BATCH, CLASSES = 24, 8, 3


class Rows(Dataset):
    """Random rows, with a transform."""

    def __init__(self):
        self.rows, self.labels = torch.randn(ROWS, 6), torch.randint(CLASSES, (ROWS,))
        self.transform = torch.clone

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return self.transform(self.rows[index]), self.labels[index]


def make_network():
    layers = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
    return nn.Sequential(*layers)


def make_trainer(algorithms, network=None, *, error=None, data=None, **options):
    """A Trainer on the CPU; the loss raises ``error``, if any, in the second batch."""
    losses = []

    def loss_fn(outputs, target):
        losses.append(outputs)
        if error is not None and len(losses) == 2:
            raise error
        return F.cross_entropy(outputs, target)

    if network is None:
        torch.manual_seed(0)
        network = make_network()
    model = ComposerClassifier(network, num_classes=CLASSES, loss_fn=loss_fn)
    options = {'max_duration': '2ep'} | options
    return trainer_of(model, Rows() if data is None else data, BATCH, algorithms, **options)


def labelled():
    return DataLoader(TensorDataset(torch.randn(BATCH, 6), torch.zeros(BATCH, dtype=torch.long)), BATCH)


METHODS = {
    'sba at the head': lambda: SBA(augment_prob=1.0),
    'sba at three layers': lambda: SBA(['input', '0', 'head'], augment_prob=1.0),
    'manifold mixup': lambda: ManifoldMixup(['input', '0']),
    'majority vote': lambda: MajorityVote(['0', 'head'], fold=2),
    'batch augmentation': lambda: BatchAugmentation(2),
    'r-drop': lambda: RDrop(),
}


def a_fit_that_ends(make):
    trainer, _ = make(eval_dataloader=labelled())
    trainer.fit()


def a_fit_that_raises(make):
    trainer, _ = make(error=ArithmeticError())
    with pytest.raises(ArithmeticError):
        trainer.fit()
    trainer.close()


def a_fit_that_is_interrupted(make):
    trainer, _ = make(error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.close()


def a_fit_that_raises_then_one_that_ends(make):
    trainer, _ = make(error=ArithmeticError())
    with pytest.raises(ArithmeticError):
        trainer.fit()
    trainer.fit()


def a_fit_that_raises_then_an_evaluation(make):
    trainer, _ = make(error=ArithmeticError())
    with pytest.raises(ArithmeticError):
        trainer.fit()
    trainer.eval(labelled())


def a_fit_that_raises_then_a_prediction(make):
    trainer, _ = make(error=ArithmeticError())
    with pytest.raises(ArithmeticError):
        trainer.fit()
    trainer.predict(labelled())


def no_fit(make):
    make()


def an_evaluation_alone(make):
    trainer, _ = make()
    trainer.eval(labelled())


def a_prediction_alone(make):
    trainer, _ = make()
    trainer.predict(labelled())


def an_evaluation_that_raises(make):
    class Broken(Callback):
        def eval_after_forward(self, state, logger):
            raise ArithmeticError

    trainer, _ = make(callbacks=[Broken()])
    with pytest.raises(ArithmeticError):
        trainer.eval(labelled())
    trainer.close()


def a_cell_that_is_run_again(make):
    """The first Trainer is neither finished nor closed."""
    first, _ = make(error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second, _ = make()
    second.fit()
    second.eval(labelled())


def two_trainers_in_turn(make):
    first, _ = make()
    second, _ = make()
    for trainer in (first, second):
        trainer.fit()
        trainer.eval(labelled())
    first.close()


SITUATIONS = [
    a_fit_that_ends,
    a_fit_that_raises,
    a_fit_that_is_interrupted,
    a_fit_that_raises_then_one_that_ends,
    a_fit_that_raises_then_an_evaluation,
    a_fit_that_raises_then_a_prediction,
    no_fit,
    an_evaluation_alone,
    a_prediction_alone,
    an_evaluation_that_raises,
    a_cell_that_is_run_again,
    two_trainers_in_turn,
]


def hooks(network):
    kinds = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks', 'forward')
    return [
        f'{kind} of {name!r}' for name, module in network.named_modules() for kind in kinds if vars(module).get(kind)
    ]


@pytest.mark.parametrize('method', list(METHODS))
@pytest.mark.parametrize('situation', SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.filterwarnings('ignore:eval_dataloader label')  # Composer's, of an evaluation after another
def test_network_and_dataset_are_left_as_they_were(situation, method):
    network, data = make_network(), Rows()

    def make(**options):
        return make_trainer([METHODS[method]()], network, data=data, **options)

    situation(make)
    assert hooks(network) == []
    assert data.transform is torch.clone
    torch.jit.script(network)


@pytest.mark.parametrize('method', ['sba at three layers', 'majority vote'])
def test_after_an_interrupted_fit_and_close_the_network_can_be_exported(method):
    network = make_network()
    trainer, _ = make_trainer([METHODS[method]()], network, error=KeyboardInterrupt(), eval_dataloader=labelled())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.close()
    exported = torch.export.export(network.eval(), (torch.randn(2, 6),))
    assert torch.equal(exported.module()(torch.ones(2, 6)), network(torch.ones(2, 6)))


def weights(trainer):
    return torch.cat([each.double().flatten() for each in trainer.state.model.state_dict().values()])


@pytest.mark.parametrize('method', list(METHODS))
def test_one_list_of_algorithms_for_two_trainers(method):
    """Both are built, then both are fitted: they run as with a list for each."""
    algorithms = [METHODS[method]()]
    shared = [make_trainer(algorithms)[0] for _ in range(2)]
    expected, log = make_trainer([METHODS[method]()])
    for trainer in (*shared, expected):
        torch.manual_seed(1)  # of dropout
        trainer.fit()
    for number, trainer in enumerate(shared):
        assert torch.equal(weights(trainer), weights(expected)), f'Trainer {number}'
        assert hooks(trainer.state.model) == []
    if method != 'majority vote':
        plain, _ = make_trainer([])
        torch.manual_seed(1)
        plain.fit()
        assert not torch.equal(weights(plain), weights(expected)), 'the algorithm had no effect'


def test_closing_one_trainer_leaves_the_algorithms_to_the_other():
    class CloseFirst(Callback):
        def batch_end(self, state, logger):
            first.close()

    sba = SBA(augment_prob=1.0)
    first, _ = make_trainer([sba])
    first.fit()
    second, log = make_trainer([sba], callbacks=[CloseFirst()])
    second.fit()
    assert len(logged(log, 'sba/kl')) == 6
    assert hooks(second.state.model) == []


def test_a_callback_that_predicts_within_a_fit_does_not_stop_it():
    class Predict(Callback):
        def batch_end(self, state, logger):
            trainer.predict(labelled())

    for algorithm, name in ((SBA('0', augment_prob=1.0), 'sba/kl'), (ManifoldMixup('0'), 'manifold_mixup/layer')):
        trainer, log = make_trainer([algorithm], callbacks=[Predict()])
        trainer.fit()
        assert len(logged(log, name)) == 6


TWINS = {
    SBA: "name all layers in one, SBA(layers=['layer1', 'head'])",
    MajorityVote: 'name all layers in one',
    ManifoldMixup: 'name all layers in one',
    BatchAugmentation: 'give one the product of both folds',
    RDrop: 'give one the sum of both alphas',
}


@pytest.mark.parametrize('kind', list(TWINS), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize('same', [True, False])
def test_two_of_a_kind_in_one_list_are_refused(kind, same):
    algorithm = kind()
    with pytest.raises(UserError) as refused:
        make_trainer([algorithm, algorithm if same else kind()])
    expected = f'One list of algorithms has 2 {kind.__name__}, which would act on each other: {TWINS[kind]}'
    assert str(refused.value).startswith(expected), str(refused.value)


def test_a_subclass_counts_as_one_of_the_kind():
    class Mine(SBA):
        pass

    for algorithms in ([SBA(), Mine()], [Mine(), SBA()]):
        with pytest.raises(UserError, match='^One list of algorithms has 2 SBA'):
            make_trainer(algorithms)


def test_sba_and_majority_vote_share_a_network():
    """In a fit with evaluations: the same training as SBA's alone, and votes as MajorityVote's alone."""

    def run(*algorithms):
        trainer, log = make_trainer(list(algorithms), eval_dataloader=labelled(), eval_interval='1ba')
        trainer.fit()
        return weights(trainer), logged(log, 'metrics/eval/CrossEntropy')

    torch.manual_seed(1)
    vicinity = Vicinity(sigma=1.0)
    sba, _ = run(SBA('0', augment_prob=1.0))
    both, votes = run(SBA('0', augment_prob=1.0), MajorityVote('0', fold=3, vicinity=vicinity))
    assert torch.equal(sba, both)
    assert len(votes) == 6


def test_a_checkpoint_of_an_earlier_version_loads_without_a_warning(tmp_path):
    """Earlier versions added no callback; pytest turns Composer's warning about that into an error."""
    trainer, _ = make_trainer([SBA()], save_folder=str(tmp_path), save_interval='1ep')
    trainer.fit()
    path = tmp_path / 'ep1-ba3-rank0.pt'
    saved = torch.load(path, weights_only=False)
    saved['state']['callbacks'] = {
        name: state for name, state in saved['state']['callbacks'].items() if name != 'DetachOnClose'
    }
    torch.save(saved, path)
    resumed, _ = make_trainer([SBA()], load_path=str(path))
    resumed.fit()
    assert torch.equal(weights(trainer), weights(resumed))


@pytest.mark.parametrize('method', ['sba at three layers', 'manifold mixup'])
def test_a_copy_of_the_network_within_a_fit_is_a_plain_network(method):
    """SWA makes such copies; hooks that hold the algorithm must not have the Trainer copied."""

    class Copy(Callback):
        def batch_end(self, state, logger):
            copies.append(copy.deepcopy(state.model))

    copies = []
    trainer, _ = make_trainer([METHODS[method]()], callbacks=[Copy()], max_duration='1ba')
    trainer.fit()
    rows = torch.randn(BATCH, 6)
    assert torch.equal(copies[0].module.eval()(rows), trainer.state.model.module.eval()(rows))
