"""`python -m fastsr.train CONFIG`: one training run; under torchrun, one in several processes."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.nn  # now: imported later, by the first optimizer, its default arguments keep the group alive

from fastsr.train.config import read_config
from fastsr.train.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (sys.argv by default); returns the exit status: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsr.train", description="Trains a network as a JSON file says (fastsr.train.config)."
    )
    parser.add_argument("config", metavar="CONFIG", help="a JSON file of settings")
    parser.add_argument("--data", metavar="DIR", help="images to train on, instead of those of CONFIG")
    parser.add_argument("--output", metavar="DIR", help="where everything made goes, instead of that of CONFIG")
    parser.add_argument("--device", metavar="NAME", help="default: a CUDA device if there is one, else the CPU")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in output, if there is one"
    )
    args = parser.parse_args(arguments)
    changes = {name: getattr(args, name) for name in ("data", "output") if getattr(args, name) is not None}
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        config = read_config(args.config, **changes)
        if several:
            cuda = args.device is None and torch.cuda.is_available()
            if cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("nccl" if cuda else "gloo")
        trainer = Trainer(config, device=args.device, resume=args.resume)
        first = trainer.rank == 0
        trainer.run(lambda line: print(line, flush=True) if first else None)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"fastsr.train: {error}", file=sys.stderr)
        return 1
    finally:
        if several and dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # the last reference ends the group's threads; one that outlives the interpreter aborts it
    return 0


if __name__ == "__main__":
    sys.exit(main())
