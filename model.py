"""ResNet-18 with a projection head, and three contrastive losses. Copy this file into your project; it needs
torch and torchvision alone.

    model = ContrastiveModel()                        # images [B, 3, S, S] -> projections [B, 128]
    loss = nt_xent(model(view1), model(view2), temperature=0.1)

Every loss takes the projections z1, z2 [B, D] of the two views (row i of one is the partner of row i of the
other; they need not be normalised), computes in float32 or better, and returns a scalar.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1 that becomes one matrix product where its input is at most 2 x 2 pixels.

    Such are the last stages of ResNet-18 at 32 and 64 px, where most taps multiply padding and a CPU's convolution
    kernels would spend half of a training step on that. The result is the same. Laying the kernel out is a product as
    well, for then its gradient comes in the layout of the weight (channels last), and no copy is made. Any other
    convolution (of another kernel or padding, dilated, in groups, with a bias) is left to nn.Conv2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        plain = (self.kernel_size, self.padding, self.dilation, self.groups, self.padding_mode) == ((3, 3), (1, 1), (1, 1), 1, "zeros")
        if max(h, w) > 2 or not plain or self.bias is not None:
            return super().forward(x)
        kernel = self.weight.permute(0, 2, 3, 1).flatten(1, 2)  # [out channels, 9, in channels]
        # Taps on one axis, [out, in]: of at most two pixels an output sees each.
        down, across = (torch.arange(s, device=x.device) - torch.arange(0, s, step, device=x.device)[:, None] + 1
                        for s, step in zip((h, w), self.stride))
        if h == w == 1:
            laid_out = kernel[:, 4:5]
        else:
            taps = (3 * down[:, None, :, None] + across[:, None]).flatten()  # [pixels out * pixels in]
            laid_out = (taps[:, None] == torch.arange(9, device=x.device)).to(kernel.dtype) @ kernel
        out = x.permute(0, 2, 3, 1).flatten(1) @ laid_out.reshape(-1, h * w * self.in_channels).T
        return out.view(n, self.out_channels, len(down), len(across)).contiguous(memory_format=torch.channels_last)


class ContrastiveModel(nn.Module):
    """ResNet-18 (torchvision's, last gamma of each block zero) and the head 512 -> 2048 -> 128 without biases.

    The ImageNet stem (7x7, stride 2, max-pool) unless small_stem: 3x3, stride 1, no max-pool, for small images
    (16 times the arithmetic).  forward: images [B, 3, S, S] float -> projections [B, 128], not normalised.
    `encoder` alone gives the features [B, 512].
    """

    def __init__(self, small_stem: bool = False, hidden: int = 2048, dim: int = 128):
        super().__init__()
        self.encoder = resnet18(zero_init_residual=True)
        if small_stem:
            self.encoder.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.encoder.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.encoder.maxpool = nn.Identity()
        for module in (*self.encoder.layer3.modules(), *self.encoder.layer4.modules()):
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                module.__class__ = SmallMapConv2d  # torchvision's weights as they are, only another forward
        features = self.encoder.fc.in_features
        self.encoder.fc = nn.Identity()
        self.head = nn.Sequential(
            nn.Linear(features, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, dim, bias=False), nn.BatchNorm1d(dim, affine=False))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


@torch.no_grad()
def embed(model: nn.Module, views: Callable[[Tensor], Tensor], index: Tensor, chunk: int = 256,
          on_chunk: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
    """Projections u, v [len(index), D], float32, of two fresh views of the samples `index`, in eval mode.

    views(index) gives an augmented batch [len(index), 3, S, S], on the network's device. on_chunk(done) is called
    before each chunk with the number of samples embedded; it may raise, to end. Leaves no trace in the model: modes
    are restored, and eval mode does not move batch norm's running statistics.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        u, v = [], []
        for start in range(0, len(index), chunk):
            if on_chunk:
                on_chunk(start)
            part = index[start:start + chunk]
            if 0 < len(part) < chunk < len(index):  # a compiled network sees one shape only
                part = torch.cat([part, index[:chunk - len(part)]])
            a, b = model(views(part.repeat(2))).float().chunk(2)
            u.append(a)
            v.append(b)
        return torch.cat(u)[:len(index)], torch.cat(v)[:len(index)]
    finally:
        for m, mode in modes:
            m.training = mode


def _similarities(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines [2B, 2B] of all views, of each row with its positive [2B], and the mask of the negatives [2B, 2B]."""
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(f"z1 {tuple(z1.shape)} and z2 {tuple(z2.shape)}: give two [B, D] tensors of one shape, B >= 2")
    with torch.autocast(z1.device.type, enabled=False):  # logits/0.1 in bfloat16 would be wrong in the first digit
        z = torch.cat([z1, z2])
        z = F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1)
        s = z @ z.T
    eye = torch.eye(len(z1), dtype=torch.bool, device=z.device)
    return s, torch.cat([s.diagonal(len(z1)), s.diagonal(-len(z1))]), ~eye.repeat(2, 2)


def _logsumexp(logits: Tensor, keep: Tensor) -> Tensor:
    return torch.logsumexp(logits.masked_fill(~keep, -torch.inf), 1)


def infonce(u: Tensor, v: Tensor, temperature: float = 1.0) -> Tensor:
    """InfoNCE of pairs u, v [..., n, D], [...] (the paper's loss, section 1): -log softmax_j(u_i.v_j) at j = i plus the same
    with u and v exchanged, mean over i. Inner products as they are: normalise the rows first where that is meant."""
    logits = u @ v.mT / temperature
    positive = logits.diagonal(dim1=-2, dim2=-1)
    return (logits.logsumexp(-1) + logits.logsumexp(-2) - 2 * positive).mean(-1)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of SimCLR (Chen et al., ICML 2020): mean over the 2B rows of -log softmax at the positive, the
    softmax over the other 2B - 1 rows of both views."""
    s, positive, negatives = _similarities(z1, z2)
    others = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    return (_logsumexp(s / temperature, others) - positive / temperature).mean()


class SogCLRLoss(nn.Module):
    """SogCLR (Yuan et al., ICML 2022): each anchor's negatives weighted by a running estimate of their mean.

    With g_i the mean of exp(s/temperature) over the 2(B-1) negatives of an anchor of sample i, the estimate
    moves as u_i <- (1-gamma) u_i + gamma g_i, apart for the two views, and their mean is stored; a sample's
    first visit sets it to g_i. Loss: mean over i, summed over the two views, of
        -s(i, positive) + mean over negatives of stopgrad(exp(s/temperature) / u_i) * s.

    num_samples: size of the training set.  Buffer `u` [num_samples]: the estimates, 0 where not yet visited.
    forward(z1, z2, index): index [B] int64, distinct row numbers of the samples in the training set.
    """

    def __init__(self, num_samples: int, temperature: float = 0.1, gamma: float = 0.9):
        super().__init__()
        self.temperature, self.gamma = temperature, gamma
        self.register_buffer("u", torch.zeros(num_samples))

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor) -> Tensor:
        s, positive, negatives = _similarities(z1, z2)
        count = len(s) - 2
        with torch.no_grad():
            weights = torch.exp(s / self.temperature) * negatives
            g = (weights.sum(1) / count).view(2, -1)  # [2, B]
            old = self.u[index].to(g.dtype)
            u = torch.where(old > 0, (1 - self.gamma) * old + self.gamma * g, g)
            self.u[index] = u.mean(0).to(self.u.dtype)
            weights = weights / (count * u.reshape(-1, 1))
        return ((weights * s).sum(1) - positive).mean() * 2


def hcl(z1: Tensor, z2: Tensor, temperature: float = 0.1, tau_plus: float = 0.1, beta: float = 1.0) -> Tensor:
    """HCL (Robinson et al., ICLR 2021): negatives n_j weighted by n_j^beta, debiased by the class prior tau_plus.

    With p = exp(s+/temperature), M = 2B-2 negatives n_j = exp(s_j/temperature) and R = sum_j n_j^(1+beta) / mean(n^beta):
        loss = mean of -log(p / (p + Ng)),  Ng = max((R - tau_plus M p) / (1 - tau_plus), M exp(-1/temperature)).
    """
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus is {tau_plus}; give a number from 0 up to, not including, 1")
    s, positive, negatives = _similarities(z1, z2)
    m, p = len(s) - 2, torch.exp(positive / temperature)
    # R in logarithms: n^(1+beta) overflows float32 long before R does.
    log_r = _logsumexp((1 + beta) / temperature * s, negatives) - _logsumexp(beta / temperature * s, negatives) + math.log(m)
    ng = (torch.exp(log_r) - tau_plus * m * p) / (1 - tau_plus)
    return torch.log1p(ng.clamp_min(m * math.exp(-1 / temperature)) / p).mean()
