"""SBA at the head of HuggingFace's models, which compute their loss inside forward; small, with random weights.

Run: pytest tests/test_hugging_face.py
"""

import pytest
import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from composer_sba import SBA, LatentExpander, MajorityVote, Vicinity
from composer_sba.errors import CutLayerError, UserError
from small_training import logged, weights

transformers = pytest.importorskip('transformers')

SMALL = {'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 32, 'hidden_size': 16, 'num_labels': 3}
TEXT = {'vocab_size': 20, 'max_position_embeddings': 16, 'hidden_dropout_prob': 0.1}
IMAGES = {'image_size': 8, 'patch_size': 4}


def words(labels):
    return [
        {'input_ids': torch.randint(1, 20, (6,)), 'attention_mask': torch.ones(6).long(), 'labels': labels()}
        for _ in range(16)
    ]


def sentences():
    return words(lambda: torch.randint(3, ()))


def padded_sentences():
    rows = sentences()
    for length, row in enumerate(rows):
        row['input_ids'][1 + length % 6 :] = 0
    return rows


def tokens():
    def labels():
        drawn = torch.randint(3, (6,))
        drawn[4:] = -100
        return drawn

    return words(labels)


def images():
    return [{'pixel_values': torch.randn(3, 8, 8), 'labels': torch.randint(3, ())} for _ in range(16)]


MODELS = {
    'Bert, sentences': (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **TEXT)),
        sentences,
    ),
    'DistilBert, sentences': (
        lambda: transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(n_layers=1, n_heads=2, dim=16, hidden_dim=32, vocab_size=20, num_labels=3)
        ),
        sentences,
    ),
    'Roberta, sentences': (
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL, **TEXT)),
        sentences,
    ),
    'GPT-2, sentences': (  # its head makes logits of every token, and the model returns those of the last
        lambda: transformers.GPT2ForSequenceClassification(
            transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20, num_labels=3, pad_token_id=0)
        ),
        padded_sentences,
    ),
    'Bert, tokens': (
        lambda: transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, **TEXT)),
        tokens,
    ),
    'ViT, images': (lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **IMAGES)), images),
}


def trainer_for(network, data, algorithms=(), **options):
    log = InMemoryLogger()
    trainer = Trainer(
        model=HuggingFaceModel(network, use_logits=True, eval_metrics=[MulticlassAccuracy(3, average='micro')]),
        train_dataloader=DataLoader(data, batch_size=8),
        eval_dataloader=DataLoader(data, batch_size=8),
        eval_interval=0,
        optimizers=torch.optim.SGD(network.parameters(), lr=0.05),
        algorithms=list(algorithms),
        loggers=log,
        device='cpu',
        seed=0,
        progress_bar=False,
        **({'max_duration': '3ep'} | options),
    )
    return trainer, log


def fit(name, algorithms=(), **options):
    make, data = MODELS[name]
    torch.manual_seed(0)
    trainer, log = trainer_for(make(), data(), algorithms, **options)
    trainer.fit()
    trained = weights(trainer), logged(log, 'sba/kl'), logged(log, 'sba/virtual_agreement')
    trainer.close()
    return trained


@pytest.mark.parametrize('name', MODELS)
def test_a_vanishing_eta_changes_nothing_and_a_large_one_pulls_predictions_together(name):
    plain, *_ = fit(name)
    vanishing, kl, agreement = fit(name, [SBA(augment_prob=1.0, eta=1e-30)])
    assert len(kl) == 6 and min(kl) > 0 and all(0 <= share <= 1 for share in agreement)
    assert torch.allclose(vanishing, plain, atol=1e-5), f'weights differ by {(vanishing - plain).abs().max()}'
    trained, pulled, _ = fit(name, [SBA(augment_prob=1.0, eta=30.0)])
    assert not torch.allclose(trained, plain, atol=1e-4)
    assert pulled[-1] < kl[-1], f'divergence {pulled[-1]} with eta = 30, {kl[-1]} without'


def test_the_token_that_the_model_returns_is_the_one_that_counts():
    make, data = MODELS['GPT-2, sentences']
    torch.manual_seed(0)
    network, batch = make().eval(), next(iter(DataLoader(data(), batch_size=8)))
    expander = LatentExpander(network, 'head', fold=2, vicinity=Vicinity(1.0, sigma=1e-6))
    with expander.armed(0):
        outputs = network(**batch)
    raw, virtual = expander.split(outputs)
    expander.remove()
    assert torch.equal(raw, outputs.logits) and raw.shape == (8, 3)
    assert virtual.shape == (2, 8, 3) and torch.allclose(virtual, raw.expand(2, -1, -1), atol=1e-4)


def test_microbatches_give_the_divergence_of_the_batch():
    calm = Vicinity(1.0, sigma=0.05, noise_scale='absolute')
    algorithm = {'vicinity': calm, 'augment_prob': 1.0, 'fold': 64, 'eta': 1e-30}
    whole, parts = (
        fit('Bert, tokens', [SBA(**algorithm)], **options)[1] for options in ({}, {'device_train_microbatch_size': 2})
    )
    assert parts == pytest.approx(whole, rel=0.2)


def test_tokens_that_the_loss_ignores_do_not_count():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SMALL, **{**TEXT, 'hidden_dropout_prob': 0.0}, attention_probs_dropout_prob=0.0)
    network, data = transformers.BertForTokenClassification(config), tokens()
    batch = next(iter(DataLoader(data, batch_size=8)))
    expander = LatentExpander(network, 'head', seed=7)
    with expander.armed(0):
        raw, virtual = expander.split(network(**batch))
    expander.remove()
    assert raw.shape == (8, 6, 3) and virtual.shape == (4, 8, 6, 3)
    soft = raw.log_softmax(-1)
    divergence = (soft.exp() * (soft - virtual.log_softmax(-1))).sum(-1)
    expected = divergence[:, batch['labels'] != -100].mean().item()
    assert expected != pytest.approx(divergence.mean().item(), rel=1e-3)
    trainer, log = trainer_for(network, data, [SBA(augment_prob=1.0, seed=7)], max_duration='1ba')
    trainer.fit()
    assert logged(log, 'sba/kl')[0] == pytest.approx(expected, rel=1e-4)


def test_a_batch_of_ignored_tokens_has_no_divergence():
    make, data = MODELS['Bert, tokens']
    rows = [{**row, 'labels': torch.full((6,), -100)} for row in data()]
    trainer, log = trainer_for(make(), rows, [SBA(augment_prob=1.0)], max_duration='1ba')
    trainer.fit()
    assert logged(log, 'sba/augmented') == [1] and logged(log, 'sba/kl') == []


def test_evaluation_votes_over_the_head():
    make, data = MODELS['ViT, images']
    torch.manual_seed(0)
    network, rows = make(), data()
    accuracies = []
    for algorithms in [], [MajorityVote(fold=64, vicinity=Vicinity(1.0, sigma=1e-6))], [MajorityVote(fold=4)]:
        trainer, _ = trainer_for(network, rows, algorithms)
        trainer.eval()
        accuracies.append(trainer.state.eval_metrics['eval']['MulticlassAccuracy'].compute().item())
    assert accuracies[0] == accuracies[1] and 0 <= accuracies[2] <= 1


@pytest.mark.parametrize(
    ('options', 'message'),
    [({'layers': 'input'}, "cut it at layers='head'"), ({'layers': ['head', 'vit.layernorm']}, "not at \\['head'"),
     ({'target': 'hard'}, "use target='soft'")],
)  # fmt: skip
def test_other_cuts_and_hard_labels_are_refused(options, message):
    with pytest.raises((CutLayerError, UserError), match=message):
        fit('ViT, images', [SBA(**options)])
