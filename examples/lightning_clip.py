"""Images and captions, two encoders, in Lightning: a callback tells the sampler what each step has embedded.

    python examples/lightning_clip.py       # random, then hard batches; prints how many images find a caption
    python examples/lightning_clip.py 2     # hard batches, two processes (DDP)
"""
import sys
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # not needed beside a copy of samplers.py
from deadleaves import deadleaves
from samplers import ContrastiveBatchSampler

BATCH_SIZE, TEMPERATURE, LEARNING_RATE, CLASSES = 32, 0.1, 2e-3, 128
WORDS = ("small", "large", "pale", "dark"), ("red", "green", "blue", "grey"), (
    "round", "square", "long", "flat", "smooth", "rough", "striped", "plain"), ("a", "the", "one", "some")
VOCABULARY = [word for part in WORDS for word in part]


def captions(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Word numbers [n, 4]: three that name the class and one that tells nothing."""
    names = labels % 4, labels // 4 % 4, labels // 16, torch.randint(4, labels.shape, generator=generator)
    starts = torch.tensor([0, *(len(part) for part in WORDS[:-1])]).cumsum(0)
    return torch.stack(names, 1) + starts


class Clip(lightning.LightningModule):
    """Two encoders to unit vectors [m, 64], and the symmetric InfoNCE loss."""
    def __init__(self):
        super().__init__()
        def block(a, b):
            return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
        self.image = nn.Sequential(block(3, 32), block(32, 64), block(64, 128), nn.AdaptiveAvgPool2d(1),
                                   nn.Flatten(), nn.Linear(128, 64))
        self.text = nn.Sequential(nn.EmbeddingBag(len(VOCABULARY), 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images / 127.5 - 1)), F.normalize(self.text(words))

    def training_step(self, batch: list[Tensor], _) -> dict[str, Tensor]:
        rows, images, words = batch
        u, v = self(images, words)
        logits, target = u @ v.T / TEMPERATURE, torch.arange(len(rows), device=u.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "u": u.detach(), "v": v.detach()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LEARNING_RATE)


class Pairs(lightning.LightningDataModule):
    """The loader, its sampler, and the sampler's place in each checkpoint at an epoch's end."""
    def __init__(self, count: int, method: str):
        super().__init__()
        self.count, self.method = count, method

    def setup(self, stage: str) -> None:
        images, labels = deadleaves("train", self.count, seed=0, num_classes=CLASSES)
        words = captions(labels, torch.Generator().manual_seed(0))
        self.dataset = TensorDataset(torch.arange(self.count), images, words)
        # One caption fits all images of its class: they share no batch.
        hard = {"exclude": labels, "temperature": TEMPERATURE} if self.method == "spectral" else {}
        self.sampler = ContrastiveBatchSampler(
            self.count, BATCH_SIZE, self.method, rank=self.trainer.global_rank,
            world_size=self.trainer.world_size, **hard)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.dataset, batch_sampler=self.sampler)

    def state_dict(self) -> dict:
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.sampler.load_state_dict(state)


class Update(lightning.Callback):
    """Tells the sampler what the step has embedded; under DDP it shares that with the other processes."""
    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        trainer.datamodule.sampler.update(batch[0], outputs["u"], outputs["v"])


def main(method: str = "spectral", devices: int = 1, epochs: int = 8, count: int = 4096, **options) -> float:
    """Trains; returns the share of new images whose nearest caption is that of their class."""
    lightning.seed_everything(0, verbose=False)
    model, pairs = Clip(), Pairs(count, method)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_epochs=epochs,
        use_distributed_sampler=False,  # the sampler deals its batches out by itself
        callbacks=[Update()], logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False} | options)
    trainer.fit(model, datamodule=pairs)
    images, labels = deadleaves("val", 1024, seed=0, num_classes=CLASSES)
    with torch.no_grad():
        u, v = model.eval()(images, captions(labels, torch.Generator().manual_seed(1)))
    share = (v[:CLASSES] @ u.T).argmax(0).eq(labels).float().mean().item()
    if trainer.is_global_zero:
        print(f"{method}: {100 * share:.1f} % of 1,024 new images find their class's caption among {CLASSES}")
    return share


if __name__ == "__main__":
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    for name in ("random", "spectral") if processes == 1 else ("spectral",):
        main(name, processes)
