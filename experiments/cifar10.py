"""Small colour photographs, on any communicator: ``python experiments/cifar10.py comm=ring launch.nproc=2``."""

import hydra
from omegaconf import DictConfig

from experiments.running.run import CONF, main, run


@hydra.main(version_base="1.3", config_path=CONF, config_name="cifar10")
def cifar10(cfg: DictConfig) -> float:
    return run(cfg)


if __name__ == "__main__":
    main(cifar10)
