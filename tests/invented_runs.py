"""Invented runs with round numbers, for the tests of the report and its parts."""

from composer_sba.study.records import append_record
from composer_sba.study.robustness import BETWEEN, STRONGER


def record(method='baseline', seed=1, accuracy=0.6, seconds=100.0, *, study='methods', setting=None, **others):
    """Return a run of ten epochs whose accuracy rises evenly for five of them and then stays at its final value."""
    recipe = {'max_duration': '10ep', 'seed': seed, 'algorithms': {}, 'model': {'name': 'resnet_cifar'}}
    algorithms = others.pop('algorithms', {})
    return {
        'study': study,
        'network': 'resnet44',
        'dataset': 'cifar10',
        'method': method,
        'setting': setting or {},
        'seed': seed,
        'hash': f'{method}{setting}{seed}',
        'recipe': {**recipe, 'algorithms': algorithms, **others.pop('recipe', {})},
        'commit': '05fe84c',
        'date': f'2026-11-2{seed}T09:12:00+00:00',
        'device': 'cpu',
        'hardware': 'Xeon, 1 of 2 cores',
        'jobs': 2,
        'versions': {'composer-sba': '0.1.0', 'torch': '2.7.0'},
        'train_samples': 5000,
        'epochs': [
            {
                **{'epoch': epoch, 'seconds': seconds * epoch / 10, 'accuracy': accuracy * min(epoch, 6) / 6},
                **{'loss': 1.0, 'calibration_error': 0.1, 'train_loss': 1.0},
            }
            for epoch in range(1, 11)
        ],
        'accuracy': accuracy,
        'loss': 1.0,
        'calibration_error': 0.1,
        'train_seconds': seconds,
        'wall_seconds': seconds + 10,
        'images_per_second': 500.0,
        'flops': 1e14,
        **others,
    }


RUNS = [  # errors: baseline 40 and 38, SBA 37 and 35, Cutout 39
    record('sba', 1, 0.63, 103.0, algorithms={'sba': {'fold': 4}}, flops=2e14),
    record('baseline', 1, 0.60, 100.0),
    record('baseline', 2, 0.62, 110.0, loss=1.1, jobs=1),
    record('sba', 2, 0.65, 115.5, algorithms={'sba': {'fold': 4}}, flops=2e14, commit='1a2b3c4'),
    record('cutout', 1, 0.61, 100.0, flops=None),
]


def layers_study():
    runs = [record(seed=s, study='layers', accuracy=0.6 + s / 100) for s in (1, 2)]
    for layer, accuracy in (('layer1', 0.61), ('head', 0.5)):
        for s in (1, 2):
            setting = {'layer': layer}
            runs.append(record('sba', s, accuracy + s / 100, 200.0, study='layers', setting=setting))
            runs.append(record('latent_ba', s, 0.60 + s / 100, 400.0, study='layers', setting=setting))
    return runs


def eta_study():
    runs = [record(seed=s, study='eta', accuracy=0.6 + s / 100) for s in (1, 2)]
    return runs + [
        record('sba', s, 0.61 + s / 100, study='eta', setting={'eta': eta}) for eta in (0.0, 0.01, 10.0) for s in (1, 2)
    ]


def write(folder, *runs):
    for run in runs:
        append_record(folder / f'{run["study"]}.jsonl', run)


def robustness_study():
    """Two seeds; errors in % under noise of 0.1 are 60, 40, 36, 38, 36, 35 and 37, plus the seed times 1 + cost."""
    methods = [
        ('baseline', {}, 60, 1),
        ('gaussian_half', {}, 40, 1),
        ('gaussian_half', STRONGER, 36, 1),
        ('gaussian_half_longer', {}, 38, 1.5),
        ('gaussian_half_longer', BETWEEN, 36, 1.5),
        ('gaussian_half_longer', STRONGER, 35, 1.5),
        ('sba_robust', {}, 37, 1.5),
    ]
    return [
        record(
            *(method, seed, 0.6),
            study='robustness',
            setting=setting,
            flops=cost * 1e14,
            recipe={'scale_schedule_ratio': 1.5} if method == 'gaussian_half_longer' else {},
            robustness=measured(noisy + seed * (1 + cost)),
        )
        for method, setting, noisy, cost in methods
        for seed in (1, 2)
    ]


def measured(noisy):
    def scores(error):
        return {'error': error / 100, 'nll': 1.0, 'calibration_error': 0.05}

    return {
        'images': 100,
        'clean': scores(30),
        'noise': [{'sigma': sigma, **scores(noisy * sigma / 0.1)} for sigma in (0.0, 0.1, 0.2)],
        'corruptions': {name: [{'severity': s, **scores(noisy)} for s in (1, 3, 5)] for name in ('fog', 'contrast')},
        'mean_corruption_error': noisy / 100,
        'attacks': [{'attack': 'pgd_l2', 'epsilon': 0.25, 'steps': 10, 'images': 50, 'error': 0.5}],
    }
