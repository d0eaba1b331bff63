"""Train the nets of the harder task, or read them from the cache, and print their accuracy.

    python -m benchmarks.tasks.train [--net residual] [--seed 0] [--quick] [--test] [--json FILE]

The test split is looked at only with ``--test``: settings are chosen by the search split.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.tasks import NETS, splits, trained
from tightrope.search.demo_task import accuracy

QUICK_IMAGES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, help="one net; all three unless given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; weights are equal only for an equal number")
    parser.add_argument("--quick", action="store_true", help=f"two epochs on {QUICK_IMAGES} images: that it runs, no more")
    parser.add_argument("--test", action="store_true", help="score the test split too")
    parser.add_argument("--json", type=Path, help='write [{"name", "value", "unit"}] here')
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    data = splits()
    shown = ["search", "second", *(["test"] if arguments.test else [])]
    rows: list[dict[str, object]] = []
    for net in [arguments.net] if arguments.net else NETS:
        start = time.process_time()
        if arguments.quick:
            schedule = replace(NETS[net].schedule, epochs=2)
            model = trained(net, arguments.seed, schedule=schedule, images=QUICK_IMAGES, progress=_print_every_100)
        else:
            model = trained(net, arguments.seed, progress=_print_every_100)
        seconds = time.process_time() - start
        scores = {split: accuracy(model, data[split]) for split in shown}
        text = "  ".join(f"{split} {100 * share:.2f} ± {100 * error:.2f} %" for split, (share, error) in scores.items())
        print(f"{net:12} seed {arguments.seed}  {text}  ({seconds:.0f} CPU s)", flush=True)
        for split, (share, error) in scores.items():
            rows.append({"name": f"{net}_{split}_accuracy", "value": 100 * share, "unit": "%"})
            rows.append({"name": f"{net}_{split}_accuracy_se", "value": 100 * error, "unit": "points"})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _print_every_100(done: int, steps: int, loss: float) -> None:
    if done % 100 == 0 or done == steps:
        print(f"  step {done} of {steps}, loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
