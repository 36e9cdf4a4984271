"""Labels: batches of P similar classes, K images of each, in pytorch-metric-learning's trainer.

    python examples/metric_learning.py    # any P classes, then similar ones; prints R@1 on classes never seen
"""
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.trainers import MetricLossOnly
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # not needed beside a copy of samplers.py
from deadleaves import deadleaves
from samplers import random_batches, spectral_batches


class SimilarClasses(BatchSampler):
    """Batches of P classes whose means lie close, K samples of each: n // (P K) of them an epoch.

    labels [n] integers; embed() -> embeddings [n, d] of all samples, called once an epoch (None: any classes
    share a batch). A class gives each of its samples before one comes again. Raises ValueError where there
    are fewer than P classes, or a class has fewer than K samples.
    """
    def __init__(self, labels: Tensor, P: int = 8, K: int = 4, embed: Callable[[], Tensor] | None = None,
                 temperature: float = 0.1, seed: int = 0):
        super().__init__(SequentialSampler(labels), P * K, drop_last=True)
        self.members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
        if len(self.members) < P or min(map(len, self.members)) < max(K, 2):
            raise ValueError(f"{len(self.members)} classes, the smallest of {min(map(len, self.members))} "
                             f"samples; give P <= {len(self.members)}, K <= that, and 2 samples a class")
        self.P, self.K, self.embed, self.temperature = P, K, embed, temperature
        self.length = len(labels) // (P * K)
        self.generator = torch.Generator().manual_seed(seed)
        self.waiting = [members[:0] for members in self.members]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        classes, batches = len(self.members), []
        if self.embed is not None:
            z = F.normalize(self.embed())  # two views of a class: the means of two halves of it
            u, v = (torch.stack([z[members[half::2]].mean(0) for members in self.members]) for half in (0, 1))
        while len(batches) < self.length:  # each time round, another partition of the classes
            order = torch.randperm(classes, generator=self.generator)
            if self.embed is None:
                chosen = random_batches(classes, self.P, self.generator)
            else:
                chosen = spectral_batches(u[order], v[order], self.P, classes // self.P, self.temperature,
                                          self.generator, refine=True).cpu()
            batches += order[chosen].tolist()
        for batch in batches[:self.length]:
            yield [row for label in batch for row in self._take(label)]

    def _take(self, label: int) -> list[int]:
        """The next K samples of a class."""
        if len(self.waiting[label]) < self.K:
            members = self.members[label]
            self.waiting[label] = members[torch.randperm(len(members), generator=self.generator)]
        rows, self.waiting[label] = self.waiting[label].split([self.K, len(self.waiting[label]) - self.K])
        return rows.tolist()


def encoder() -> nn.Module:
    """Vectors [m, 64] of images [m, 3, 32, 32] in -1 to 1."""
    def block(a, b):
        return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
    return nn.Sequential(block(3, 32), block(32, 64), block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(128, 64))


@torch.no_grad()
def embed_all(model: nn.Module, images: Tensor) -> Tensor:
    """Embeddings [n, 64] in eval mode."""
    training = model.training
    z = torch.cat([model.eval()(part) for part in images.split(512)])
    model.train(training)
    return z


def main(similar: bool = True, epochs: int = 8, count: int = 4096, seed: int = 0) -> float:
    """Trains on half of 128 classes; returns R@1 on the other half."""
    torch.manual_seed(seed)
    images, labels = deadleaves("train", count, seed=0, num_classes=128)
    images, known = images / 127.5 - 1, labels < 64
    train, train_labels, model = images[known], labels[known], encoder()
    embed = (lambda: embed_all(model, train)) if similar else None
    sampler = SimilarClasses(train_labels, embed=embed, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = MetricLossOnly(
        models={"trunk": model}, optimizers={"trunk_optimizer": optimizer}, batch_size=sampler.batch_size,
        loss_funcs={"metric_loss": MultiSimilarityLoss()}, sampler=sampler,
        dataset=TensorDataset(train, train_labels), dataloader_num_workers=0, data_device=torch.device("cpu"))
    trainer.train(num_epochs=epochs)
    z, new = F.normalize(embed_all(model, images[~known])), labels[~known]
    nearest = (z @ z.T).fill_diagonal_(-1).argmax(1)
    share = (new[nearest] == new).float().mean().item()
    print(f"{'similar' if similar else 'any'} classes: R@1 {100 * share:.1f} % on 64 classes never seen")
    return share


if __name__ == "__main__":
    for choice in (False, True):
        main(choice)
