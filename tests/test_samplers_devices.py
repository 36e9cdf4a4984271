"""Where samplers.py computes, without a GPU: nothing mixes devices, or waits for a value of one.

    python -m pytest tests/test_samplers_devices.py
"""
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import augment as augmentation
import samplers
from samplers import (ContrastiveBatchSampler, batch_losses, osgd_batches, osgd_batches_with_replacement,
                      select_by_loss, spectral_affinity, spectral_batches)
from test_samplers import seeded, views


def test_no_device_slip_and_no_value_read_back():
    with FakeTensorMode():
        u, v = (torch.randn(50, 8, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        for device in ("cuda", "cpu"):  # of the batches: random_batches gives them on the CPU
            batches = torch.zeros(7, 4, dtype=torch.int64, device=device)
            for x, shape in ((batch_losses(u, v, batches), (7,)), (select_by_loss(u, v, batches, 2), (2, 4)),
                             (osgd_batches(u, v, 4, 6, 2), (4, 4)),
                             (osgd_batches_with_replacement(u, v, 4, 6, 2), (2, 4))):
                assert x.device.type == "cuda" and x.shape == shape
        with pytest.raises(Exception, match="device"):
            batch_losses(u, torch.randn(50, 8, dtype=torch.bfloat16), batches)
        with pytest.raises(DataDependentOutputException):  # and a value read back
            bool(batch_losses(u, v, batches).sum() > 0)


class Copies(TorchDispatchMode):
    """Notes the devices to which copies go that nothing waits for."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result, kwargs = function(*args, **(kwargs or {})), kwargs or {}
        if "_to_copy" in str(function) and kwargs.get("non_blocking"):
            self.targets.add(result.device.type)
        return result


def test_what_goes_to_the_cpu_is_waited_for(monkeypatch):
    """Else it would be read before it is there: row numbers of nothing."""
    for check in "_check", "_check_rows":  # read values, which fake tensors have not
        monkeypatch.setattr(samplers, check, lambda *_, **__: None)
    monkeypatch.setattr(augmentation, "_ON_DEVICE", {})
    with FakeTensorMode(), Copies() as copies:
        copies.targets = set()
        for here, there in ("cpu", "cuda"), ("cuda", "cpu"):
            u, v = (torch.randn(48, 8, device=here) for _ in range(2))
            batches = torch.zeros(7, 4, dtype=torch.int64, device=there)
            batch_losses(u, v, batches)
            select_by_loss(u, v, batches, 2)
            sampler = ContrastiveBatchSampler(48, 4)
            sampler.seen = torch.zeros(48, dtype=torch.bool)
            sampler.update(torch.zeros(48, dtype=torch.int64, device=there), u, v)
            images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8, device=here)
            augmentation.augment(images, 8, torch.rand(4, augmentation.NUM_UNIFORM, device=there))
            views_of = augmentation.views_of(images, torch.Generator(), 8, 0.5, 1, (0, 0, 0), (1, 1, 1),
                                             images.device)
            views_of(torch.zeros(4, dtype=torch.int64, device=there))
    assert copies.targets == {"cuda"}


def tensors(x):
    if isinstance(x, (tuple, list)):
        return [t for y in x for t in tensors(y)]
    return tensors(list(x.values())) if isinstance(x, dict) else [x] * isinstance(x, torch.Tensor)


def convert(x, change):
    if isinstance(x, (tuple, list)) and not hasattr(x, "_fields"):
        return type(x)(convert(y, change) for y in x)
    if isinstance(x, dict):
        return {k: convert(y, change) for k, y in x.items()}
    return change(x) if isinstance(x, torch.Tensor) else x


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU, and obeys CUDA's rules of what may be mixed, with real values.

    FakeTensorMode has no values, and so cannot follow a loop that ends when nothing is left to exchange.
    """
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if function == torch.Tensor.device.__get__:
                return torch.device("cuda" if isinstance(args[0], cls) else "cpu")

            def here(x):
                return convert(x, lambda t: t.as_subclass(torch.Tensor))

            def there(x):
                return x if isinstance(x, torch.Size) else convert(x, lambda t: t.as_subclass(cls))
            target = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.device)]
            if name in ("to", "cpu"):
                words = here([x for x in args if not isinstance(x, torch.device)])
                keep = {k: x for k, x in kwargs.items() if not isinstance(x, torch.device)}
                moved = function(*words, **keep) if len(words) > 1 or keep else words[0].clone()
                stays = name == "to" and not target and isinstance(args[0], cls)
                return there(moved) if stays or target and target[0].type == "cuda" else moved
            mixed = {isinstance(t, cls) for t in tensors((args, kwargs)) if t.ndim}
            if len(mixed) > 1 and not (name in ("__getitem__", "__setitem__") and isinstance(args[0], cls)):
                raise RuntimeError(f"tensors on two devices in {name}")
            if name == "numpy":
                raise TypeError("a GPU's tensor has no numpy()")
            kwargs |= {"device": torch.device("cpu")} if target else {}
            result = function(*here(args), **here(kwargs))
            return result if name.endswith("item__") and not isinstance(args[0], cls) else there(result)


class GPU(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device) and x.type == "cuda"]
        if any(isinstance(t, Elsewhere) for t in tensors((args, kwargs))) or wanted and tensors(args):
            return Elsewhere.__torch_function__(function, types, args, kwargs)
        if wanted:  # a factory
            return function(*args, **kwargs | {"device": "cpu"}).as_subclass(Elsewhere)
        return function(*args, **kwargs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"exclude": torch.arange(96) % 20}, {"relative_margin": 0.1}])
def test_refinement_mixes_no_devices(more):
    u, v = views(96)
    with GPU():
        x, y = (t.as_subclass(Elsewhere) for t in (u, v))
        assert x.device.type == "cuda" and spectral_affinity(x, y, 8).device.type == "cuda"
        with pytest.raises(RuntimeError, match="two devices"):
            x @ v.T
        with pytest.raises(RuntimeError, match="two devices"):
            v[x.argmax(1)]
        batches = spectral_batches(x, y, 8, 12, generator=seeded(), refine=True, **more)
        assert batches.device.type == "cuda"
    expected = spectral_batches(u, v, 8, 12, generator=seeded(), refine=True, **more)
    assert torch.equal(batches.as_subclass(torch.Tensor), expected)
