"""Measure a training step of a HuggingFace model with SBA at the head and with R-Drop, relative to a plain step.

The model has the size of DistilBERT (66 million parameters) and random weights. The kinds of step take turns.

Run: python benchmarks/hugging_face_step.py [--rounds 8] [--batch 8] [--tokens 128] [--layers 6]
"""

import argparse
import statistics
import time

import torch
import transformers
from data_path import at_least

from composer_sba import LatentExpander
from composer_sba import functional as sbaf
from composer_sba.algorithms.r_drop import two_pass_kl

KINDS = ('plain', 'sba', 'r_drop')


def main() -> int:
    """Print the median ratio of each kind to the plain step before it, with quartiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=at_least(2), default=8)
    parser.add_argument('--batch', type=at_least(1), default=8)
    parser.add_argument('--tokens', type=at_least(1), default=128)
    parser.add_argument('--layers', type=at_least(1), default=6)
    args = parser.parse_args()

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    model = transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(n_layers=args.layers))
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    expander = LatentExpander(model, 'head', fold=4)
    batch = {
        'input_ids': torch.randint(1, 30000, (args.batch, args.tokens), device=device),
        'attention_mask': torch.ones(args.batch, args.tokens, dtype=torch.int64, device=device),
        'labels': torch.randint(2, (args.batch,), device=device),
    }
    twice = {name: value.repeat_interleave(2, 0) for name, value in batch.items()}

    def step(kind: str, number: int) -> float:
        start = time.perf_counter()
        if kind == 'plain':
            loss = model(**batch).loss
        elif kind == 'sba':
            with expander.armed(number):
                outputs = model(**batch)
            raw, virtual = expander.split(outputs)
            loss = outputs.loss + 0.1 * sbaf.soft_label_kl(raw, virtual)
        else:
            outputs = model(**twice)
            loss = outputs.loss + 0.3 * two_pass_kl(outputs.logits)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for kind in KINDS:
        step(kind, 0)
    ratios: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    for number in range(args.rounds):
        for kind in KINDS[1:]:
            plain = [step('plain', number)]
            seconds = step(kind, number)
            plain.append(step('plain', number))
            ratios[kind].append(seconds / statistics.mean(plain))
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    print(f'{millions:.0f} M parameters, {device}, torch {torch.__version__}')
    print(f'{args.batch} sentences of {args.tokens} tokens; {statistics.mean(plain):.2f} s a plain step')
    for kind, values in ratios.items():
        low, median, high = statistics.quantiles(values, n=4)
        print(f'{kind:>6} ÷ plain: {median:.3f} [{low:.3f}, {high:.3f}], n = {len(values)}')
    return 0


if __name__ == '__main__':
    main()
