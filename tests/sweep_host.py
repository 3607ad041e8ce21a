"""The command on one of several hosts, with two tiny data sets' worth of work; see sweep_test.py.

    python tests/sweep_host.py FOLDER PORT HOST HOSTS
"""

import os
import sys

folder, port, host, hosts = sys.argv[1:]
os.environ["AWM_CACHE_DIR"] = f"{folder}/cache"

from conftest import OneBlockCNN, tiny_images

from awm_jax import data, models
from experiments import networks, oneshot

models.MODELS["one_block_cnn"] = OneBlockCNN
dataset = data.Dataset("digits", *tiny_images(200), *tiny_images(90), 10, False)
data.load = lambda name, data_dir=None, **options: dataset
trained = networks.training.train


def train(*args, **kwargs):
    print("TRAINED", flush=True)
    return trained(*args, **kwargs)


networks.training.train = train
sys.exit(oneshot.main([
    "--epochs", "1", "--arch", "one_block_cnn", "--attack", "badnets,blended", "--seeds", "3",
    "--defence", "clp", "--sweep", "on", "--out", f"{folder}/run", "--distributed",
    "--coordinator", f"localhost:{port}", "--num_hosts", hosts, "--host", host]))
