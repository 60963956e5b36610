"""Networks that are trained on the labels alone."""

import itertools

import torch
from torch.nn import functional

from diffcam_bench.sham.networks import NETWORKS, Classifier
from diffcam_bench.sham.pictures import Pictures, Sizes, batches


def trained(name: str, seed: int, pictures: Pictures, sizes: Sizes) -> Classifier:
    """One of `NETWORKS`, on the device of the pictures."""
    torch.manual_seed(seed)
    network = NETWORKS[name](pictures.classes).to(pictures.device)
    _train(network, pictures, sizes, seed)
    return network


def _train(network: Classifier, pictures: Pictures, sizes: Sizes, seed: int) -> None:
    steps = max(1, sizes.epochs * -(-len(pictures.train) // sizes.batch))
    optimizer = torch.optim.AdamW(network.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    network.train()
    for images, labels in itertools.islice(batches(pictures, sizes, seed), steps):
        loss = functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    network.eval()
