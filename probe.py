"""What an encoder's features are worth to a classifier: nearest neighbours, and logistic regression."""
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augment import MEAN, STD


def probe(encoder: nn.Module, sets: list[tuple[Tensor, Tensor, Tensor]], size: int, device: torch.device, seed: int) -> np.ndarray:
    """Whether the class of a validation image is found by neighbours and by a linear classifier, bool [2, n].

    encoder: images [B, 3, size, size] -> features [B, d].  sets: of training and of validation the uint8 images
    [N, 3, H, H], the rows [n] of them to use, and the labels [N]. The images are not augmented, and embedded once.
    Neighbours: the 20 of greatest cosine vote with exp(cosine / 0.07) (Wu et al., CVPR 2018). Linear: multinomial logistic
    regression on standardised features by L-BFGS; its L2 is the best on a fifth of the training images held out of it.
    Raises ValueError where there is but one class, or features that are not finite.
    """
    std, mean = (torch.tensor(x, device=device)[:, None, None] for x in (STD, MEAN))

    def view(images: Tensor) -> Tensor:
        x = images.to(device).float() / 255
        if x.shape[-1] != size:
            x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
        return ((x - mean) / std).contiguous(memory_format=torch.channels_last)
    if sets[0][2].max() == 0:
        raise ValueError("--probe needs images of two classes or more: leave it out")
    encoder.eval()
    with torch.no_grad():
        (x, y), (val_x, val_y) = ((torch.cat([encoder(view(images[part])) for part in rows.split(256)]).float(),
                                   labels[rows].to(device)) for images, rows, labels in sets)
        if not (x.isfinite().all() and val_x.isfinite().all()):
            raise ValueError("the features hold NaN or infinity: give a run whose loss is finite")
        classes = int(max(y.max(), val_y.max())) + 1
        gallery, near = F.normalize(x, dim=1), []
        for part in F.normalize(val_x, dim=1).split(max(1, 2 ** 23 // len(x))):
            cosine, index = (part @ gallery.T).topk(min(20, len(x)), dim=1)
            votes = part.new_zeros(len(part), classes).scatter_add_(1, y[index], (cosine / 0.07).exp())
            near.append(votes.argmax(1))
        mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
        x, val_x = (x - mean) / std, (val_x - mean) / std

    def fit(x: Tensor, y: Tensor, l2: float, weight: Tensor) -> Tensor:
        weight = weight.clone().requires_grad_()  # [classes, d + 1], the last column the biases
        optimizer = torch.optim.LBFGS([weight], max_iter=50, history_size=10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(x, weight[:, :-1], weight[:, -1]), y) + l2 / 2 * weight[:, :-1].square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return weight.detach()

    def predict(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight[:, :-1], weight[:, -1]).argmax(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(device)
    held, rest = order[:max(1, len(x) // 5)], order[max(1, len(x) // 5):]
    weight, tried = x.new_zeros(classes, x.shape[1] + 1), {}
    for l2 in (0.3, 0.1, 0.03, 0.01, 0.003):  # from strong to weak, each from where the last ended
        weight = fit(x[rest], y[rest], l2, weight)
        tried[l2] = (predict(x[held], weight) == y[held]).float().mean().item()
    weight = fit(x, y, max(tried, key=tried.get), weight)
    return torch.stack([torch.cat(near) == val_y, predict(val_x, weight) == val_y]).cpu().numpy()
