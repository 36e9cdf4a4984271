"""Hard batches in the SentenceTransformerTrainer. Copy this file and samplers.py.

    hard = hard_batches(model, train, columns=("anchor", "positive"))
    args = SentenceTransformerTrainingArguments(..., batch_sampler=hard)
    SentenceTransformerTrainer(model, args, train_dataset=train, loss=loss, callbacks=[hard]).train()
"""
import functools
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not needed beside a copy of samplers.py
from samplers import ContrastiveBatchSampler


class hard_batches(TrainerCallback):
    """For SentenceTransformerTrainingArguments(batch_sampler=...) and the trainer's callbacks=[...], both.

    train: the Dataset or DatasetDict to train on; others, to evaluate on, get plain batches. refresh: embed a
    "window" at a time, or all at the start of each "epoch"; or "free": take what the steps embed of the first
    two columns. Rows with equal texts in one of the columns share no batch. Prompts are the arguments'. A
    checkpoint holds sampler.pt, and resume_from_checkpoint goes on with the batches that would have come.
    options: ContrastiveBatchSampler's; temperature: 1 / scale of the loss."""
    fetched = hook = prompts = None  # until training begins

    def __init__(self, model, train, columns=("anchor", "positive"), refresh="window", **options):
        if refresh not in ("window", "epoch", "free"):
            raise ValueError(f"refresh is {refresh!r}; give 'window', 'epoch' or 'free'")
        self.model, self.columns, self.free, self.samplers = model, columns, refresh == "free", {}
        self.train = list(train.values()) if isinstance(train, dict) else [train]
        self.options = {"temperature": 0.05, "at_once": refresh == "epoch"} | options

    def __call__(self, dataset, batch_size, drop_last, valid_label_columns=None, generator=None, seed=0):
        name = next((i for i, known in enumerate(self.train) if known is dataset), None)
        if name is None:
            return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)
        n, B, every = len(dataset), min(batch_size, len(dataset)), dataset[:]
        # A graph of rows and texts: rows that hang together are no negatives of each other.
        texts = [np.unique(every[c], return_inverse=True)[1] + n * i for i, c in enumerate(self.columns, 1)]
        edges = np.tile(np.arange(n), len(texts)), np.concatenate(texts)
        graph = coo_array((np.ones(len(edges[0])), edges), shape=2 * [n * (len(texts) + 1)])
        options = {"k": max(1, min(40, n // B, 4096 // B)), "seed": seed,
                   "exclude": connected_components(graph, directed=False)[1][:n]} | self.options
        if not self.free:
            options["embed"] = lambda rows: self.embed(dataset[rows.tolist()])
        self.samplers[name] = sampler = _Told(n, B, **options)
        sampler.tell = functools.partial(self.tell, name)
        return sampler

    def tell(self, name, rows):
        if self.fetched is None:
            raise ValueError("hard_batches is no callback of the trainer; give it in callbacks=[...] as well")
        self.fetched.append((name, rows))

    def embed(self, batch):
        prompts = self.prompts  # one, or by column, or by data set, as for the trainer
        if isinstance(prompts, dict) and "dataset_name" in batch:
            prompts = prompts.get(batch["dataset_name"][0], prompts)
        by_column = prompts if isinstance(prompts, dict) else dict.fromkeys(self.columns, prompts)
        return [self.model.encode(batch[c], prompt=by_column.get(c) or "", convert_to_tensor=True,
                                  show_progress_bar=False) for c in self.columns]

    def on_train_begin(self, args, state, control, **_):
        self.prompts = args.prompts
        if len(self.samplers) < len(self.train):
            raise ValueError("batch_sampler is another object, or train_dataset other than train; give both")
        if self.free and (args.n_gpu > 1 or args.world_size > 1 < len(self.samplers)):
            raise ValueError("refresh is 'free' and GPUs share a process, or processes several data sets; "
                             "start one process a GPU with torchrun, or give 'window'")
        if state.global_step:  # resumed
            path = f"{args.output_dir}/checkpoint-{state.global_step}/sampler.pt"
            for name, saved in torch.load(path).items():
                self.samplers[name].load_state_dict(saved)
        if self.free and self.hook is None:
            self.hook = self.model.register_forward_hook(self.keep)

    def on_train_end(self, *_, **__):
        self.hook = self.hook and self.hook.remove()

    def keep(self, model, _, output):  # the first two columns; the loss may embed parts of them, or repeat it
        if model.training and sum(map(len, self.embedded)) < 2 * len(self.fetched[self.trained][1]):
            self.embedded.append(output["sentence_embedding"].detach())

    def on_epoch_begin(self, args, state, control, **_):
        # The data set and rows of each batch fetched, which runs ahead of training.
        self.fetched, self.trained, self.embedded = [], 0, []

    def on_step_end(self, args, state, control, **_):
        if self.free:
            name, rows = self.fetched[self.trained + args.process_index]
            u, v = torch.cat(self.embedded)[:2 * len(rows)].chunk(2)
            self.samplers[name].update(rows, u, v)
            self.embedded = []
        self.trained += args.world_size

    on_substep_end = on_step_end  # where gradients accumulate

    def on_save(self, args, state, control, **_):
        behind = [name for name, _ in self.fetched[self.trained:]]
        states = {name: sampler.state_dict(behind.count(name)) for name, sampler in self.samplers.items()}
        if state.is_world_process_zero:
            torch.save(states, f"{args.output_dir}/checkpoint-{state.global_step}/sampler.pt")

    def __reduce__(self):  # the trainer pickles its arguments, which need no model
        return str, ("hard_batches",)


class _Told(ContrastiveBatchSampler):
    def __iter__(self):
        skipped = self.step if self.loaded else 0  # by the trainer, in several processes only whole batches
        yield from [list(range(self.batch_size))] * skipped
        for rows in super().__iter__():
            self.tell(rows)
            yield rows
