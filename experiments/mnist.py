"""Handwritten digits, on any communicator: ``python experiments/mnist.py comm=ring launch.nproc=2``."""

import hydra
from omegaconf import DictConfig

from experiments.running.run import CONF, main, run


@hydra.main(version_base="1.3", config_path=CONF, config_name="mnist")
def mnist(cfg: DictConfig) -> float:
    return run(cfg)


if __name__ == "__main__":
    main(mnist)
