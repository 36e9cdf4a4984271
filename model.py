"""ResNet-18 with a projection head, and contrastive losses. Copy this file into your project; it needs torch
and torchvision alone.

    model = ContrastiveModel()                        # images [B, 3, S, S] -> projections [B, 128]
    loss = nt_xent(model(view1), model(view2), temperature=0.1)

Every loss takes the projections z1, z2 [B, D] of the two views (row i of one is the partner of row i of the
other; they need not be normalised), computes in float32 or better, in logarithms, and returns a scalar.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18


class SmallMapConv2d(nn.Conv2d):
    """A 3x3 convolution with padding 1; on the CPU one matrix product where its input is at most 2 x 2.

    Such are the last stages of ResNet-18 at 32 and 64 px, where most taps multiply padding and a CPU's
    kernels would spend half of a training step on that. The result is the same. Laying the kernel out is a
    product as well, for then its gradient comes in the layout of the weight (channels last), and no copy is
    made. Any other convolution (of another kernel or padding, dilated, in groups, with a bias, on a GPU) is
    left to nn.Conv2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        kind = self.kernel_size, self.padding, self.dilation, self.groups, self.padding_mode, self.bias
        if x.device.type != "cpu" or max(h, w) > 2 or kind != ((3, 3), (1, 1), (1, 1), 1, "zeros", None):
            return super().forward(x)
        kernel = self.weight.permute(0, 2, 3, 1).flatten(1, 2)  # [out channels, 9, in channels]
        # Taps on one axis, [out, in]: of at most two pixels an output sees each.
        down, across = (torch.arange(side) - torch.arange(0, side, step)[:, None] + 1
                        for side, step in zip((h, w), self.stride))
        if h == w == 1:
            laid_out = kernel[:, 4:5]
        else:
            taps = (3 * down[:, None, :, None] + across[:, None]).flatten()  # [pixels out * pixels in]
            laid_out = (taps[:, None] == torch.arange(9)).to(kernel.dtype) @ kernel
        out = x.permute(0, 2, 3, 1).flatten(1) @ laid_out.reshape(-1, h * w * self.in_channels).T
        out = out.view(n, self.out_channels, len(down), len(across))
        return out.contiguous(memory_format=torch.channels_last)


class _PerView:
    """Batch norm that in training sees each of `views` equal parts of the batch apart, one after another.

    So are its outputs and running statistics those of a pass a view, while the convolutions between see all
    at once. Above a BatchNorm class of torch.nn.
    """
    views = 1

    def forward(self, x: Tensor) -> Tensor:
        if self.views == 1 or not self.training:
            return super().forward(x)
        return torch.cat([
            F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias, True,
                         self.momentum, self.eps) for part in x.chunk(self.views)])


class PerViewBatchNorm1d(_PerView, nn.BatchNorm1d):
    pass


class PerViewBatchNorm2d(_PerView, nn.BatchNorm2d):
    pass


class ContrastiveModel(nn.Module):
    """ResNet-18 (torchvision's, last gamma of each block zero), head 512 -> 2048 -> 128 without biases.

    The ImageNet stem (7x7, stride 2, max-pool) unless small_stem: 3x3, stride 1, no max-pool, for small
    images (16 times the arithmetic).  forward: images [B, 3, S, S] float -> projections [B, 128], not
    normalised. `encoder` alone gives the features [B, 512].  views: of how many a batch consists in training,
    one after the other; batch norm sees each apart.
    """

    def __init__(self, small_stem: bool = False, hidden: int = 2048, dim: int = 128, views: int = 1):
        super().__init__()
        self.encoder = resnet18(zero_init_residual=True, norm_layer=PerViewBatchNorm2d)
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
            nn.Linear(features, hidden, bias=False), PerViewBatchNorm1d(hidden), nn.ReLU(inplace=True),
            nn.Linear(hidden, dim, bias=False), PerViewBatchNorm1d(dim, affine=False))
        for module in self.modules():
            if isinstance(module, _PerView):
                module.views = views

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


@torch.no_grad()
def embed(model: nn.Module, views: Callable[[Tensor], Tensor], index: Tensor, chunk: int = 256,
          on_chunk: Callable[[int], None] | None = None) -> tuple[Tensor, Tensor]:
    """Projections u, v [len(index), D], float32, of two fresh views of the samples `index`, in eval mode.

    views(index) gives an augmented batch [len(index), 3, S, S], on the network's device. on_chunk(done) is
    called before each chunk with the number of samples embedded; it may raise, to end. Leaves no trace in the
    model: modes are restored, and eval mode does not move batch norm's running statistics.
    """
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        u, v = [], []
        for start in range(0, len(index), chunk):
            if on_chunk:
                on_chunk(start)
            part = index[start:start + chunk]
            if 0 < len(part) < chunk < len(index):  # all parts are of one shape
                part = torch.cat([part, index[:chunk - len(part)]])
            a, b = model(views(part.repeat(2))).float().chunk(2)
            u.append(a)
            v.append(b)
        return torch.cat(u)[:len(index)], torch.cat(v)[:len(index)]
    finally:
        for m, mode in modes:
            m.training = mode


def unit(x: Tensor) -> Tensor:
    """Rows [..., D] of length 1, float32 or float64, also where squares are out of range; zeros stay."""
    x = x if x.dtype == torch.float64 else x.float()
    largest = x.detach().abs().amax(-1, keepdim=True)
    return F.normalize(x / largest.masked_fill(largest == 0, 1), dim=-1)


def _logits(z1: Tensor, z2: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """All views' cosines / temperature [2B, 2B], each row's positive [2B], the negatives' mask [2B, 2B]."""
    if z1.ndim != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(f"z1 {tuple(z1.shape)}, z2 {tuple(z2.shape)}: give two tensors [B, D], B >= 2")
    with torch.autocast(z1.device.type, enabled=False):  # in bfloat16 a logit is wrong in the first digit
        z = unit(torch.cat([z1, z2]))
        logits = z @ z.T / temperature
    own = torch.eye(len(z1), dtype=torch.bool, device=z.device).repeat(2, 2)
    return logits, torch.cat([logits.diagonal(len(z1)), logits.diagonal(-len(z1))]), ~own


def _logsumexp(logits: Tensor, keep: Tensor) -> Tensor:
    return logits.masked_fill(~keep, -torch.inf).logsumexp(1)


def infonce(u: Tensor, v: Tensor, temperature: float = 1.0) -> Tensor:
    """InfoNCE of pairs u, v [..., n, D], [...] (Cho et al., section 2): mean over i of -log softmax_j u_i.v_j
    at j = i plus that with u and v exchanged. Inner products as they are: normalise where that is meant."""
    with torch.autocast(u.device.type, enabled=False):
        u, v = (x if x.dtype == torch.float64 else x.float() for x in (u, v))
        logits = u @ v.mT / temperature
    positive = logits.diagonal(dim1=-2, dim2=-1)
    return (logits.logsumexp(-1) + logits.logsumexp(-2) - 2 * positive).mean(-1)


def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """NT-Xent of SimCLR (Chen et al., ICML 2020): mean over the 2B rows of -log softmax at the positive, the
    softmax over the other 2B - 1 rows of both views."""
    logits, positive, _ = _logits(z1, z2, temperature)
    others = ~torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return (_logsumexp(logits, others) - positive).mean()


def dcl(z1: Tensor, z2: Tensor, temperature: float = 0.1) -> Tensor:
    """DCL (Yeh et al., ECCV 2022): NT-Xent without the positive in its denominator, so that the gradient does
    not vanish when a batch has become easy. May be negative."""
    logits, positive, negatives = _logits(z1, z2, temperature)
    return (_logsumexp(logits, negatives) - positive).mean()


class SogCLRLoss(nn.Module):
    """SogCLR (Yuan et al., ICML 2022): each anchor's negatives weighted by a running estimate of their mean.

    With g_i the mean of exp(s/temperature) over the 2(B-1) negatives of an anchor of sample i, the estimate
    moves as u_i <- (1-gamma) u_i + gamma g_i, apart for the two views, and their mean is stored; a sample's
    first visit sets it to g_i. Loss: mean over i, summed over the two views, of
        -s(i, positive) + mean over negatives of stopgrad(exp(s/temperature) / u_i) * s.

    num_samples: of the training set.  Buffer `log_u` [num_samples]: the estimates' logarithms, -inf where not
    yet visited.  forward(z1, z2, index): index [B] int64, distinct row numbers in the training set.
    """

    def __init__(self, num_samples: int, temperature: float = 0.1, gamma: float = 0.9):
        super().__init__()
        self.temperature, self.gamma = temperature, gamma
        self.register_buffer("log_u", torch.full((num_samples,), -torch.inf))

    def forward(self, z1: Tensor, z2: Tensor, index: Tensor) -> Tensor:
        logits, positive, negatives = _logits(z1, z2, self.temperature)
        count = len(logits) - 2
        with torch.no_grad():
            # g, u and old are logarithms.
            g = (_logsumexp(logits, negatives) - math.log(count)).view(2, -1)  # [2, B]
            keep, take = (math.log(x) if x else -math.inf for x in (1 - self.gamma, self.gamma))
            old = self.log_u[index].to(g.dtype)
            u = torch.where(old > -torch.inf, torch.logaddexp(keep + old, take + g), g)
            self.log_u[index] = (u.logsumexp(0) - math.log(2)).to(self.log_u.dtype)
            weights = (logits - u.reshape(-1, 1)).exp().masked_fill(~negatives, 0) / count
        return ((weights * logits).sum(1) - positive).mean() * 2 * self.temperature


def hcl(z1: Tensor, z2: Tensor, temperature: float = 0.1, tau_plus: float = 0.1, beta: float = 1.0) -> Tensor:
    """HCL (Robinson et al., ICLR 2021): negatives weighted by n_j^beta, debiased by the class prior tau_plus.

    With p = exp(s+/temperature), M = 2B-2 negatives n = exp(s/temperature), R = sum n^(1+beta) / mean n^beta:
        loss = mean of -log(p / (p + N)), N = max((R - tau_plus M p) / (1 - tau_plus), M exp(-1/temperature)).
    """
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus is {tau_plus}; give a number from 0 up to, not including, 1")
    logits, positive, negatives = _logits(z1, z2, temperature)
    m = len(logits) - 2
    log_r = _logsumexp((1 + beta) * logits, negatives) - _logsumexp(beta * logits, negatives) + math.log(m)
    # log(R - X) = log R + log(1 - X / R), where X < R.
    ratio = positive + (math.log(tau_plus * m) if tau_plus else -math.inf) - log_r
    floor = torch.full_like(log_r, math.log(m) - 1 / temperature)
    log_ng = log_r + (-torch.expm1(ratio.clamp(max=-1e-6))).log() - math.log1p(-tau_plus)
    log_ng = torch.where(ratio < -1e-6, log_ng, floor).maximum(floor)
    return F.softplus(log_ng - positive).mean()
