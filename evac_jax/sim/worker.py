"""Command line of a simulator process: `python -m evac_jax.sim.worker`.

Started by `evac_jax.bridge.client.SimulatorClient`, never by hand: the process inherits two file
descriptors, a socket to the trainer and the shared slots. The first message on the socket is the
worker spec, a JSON object:

    environment  "module:factory", where factory(config) returns an `Environment`
                 (evac_jax/bridge/environment.py)
    config       JSON object handed to the factory; default empty
    device       torch device, added to the config as "device"; default: left to the config
    parts        pipeline stages: the environments are cut in so many parts that are asked one by
                 one; default 1
    threads      CPU threads for torch and OpenMP; default 1
    slots        "shared_memory" or "cuda_ipc"; default: cuda_ipc if trainer and simulator use the
                 same GPU, else shared_memory
"""

import argparse
import sys

from evac_jax.bridge import server


def main() -> int:
    """Serve one environment until the trainer closes the connection; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--connection", type=int, required=True, help="inherited socket")
    parser.add_argument("--slots", type=int, required=True, help="inherited shared memory file")
    parser.add_argument("--name", default="", help="shown in process lists only")
    args = parser.parse_args()
    return server.run(args.connection, args.slots)


if __name__ == "__main__":
    sys.exit(main())
