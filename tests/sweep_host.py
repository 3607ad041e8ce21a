"""The command on one of several hosts, on tiny images, saying when it trains; see sweep_test.py.

    python tests/sweep_host.py FOLDER PORT HOST HOSTS
"""

import sys

from conftest import OneBlockCNN, tiny_images

from awm_jax import data, models
from experiments import networks, oneshot

folder, port, host, hosts = sys.argv[1:]
models.MODELS["one_block_cnn"] = OneBlockCNN
dataset = data.Dataset("digits", *tiny_images(200), *tiny_images(90), 10, False)
data.load = lambda name, data_dir=None, **options: dataset
trained = networks.training.train


def train(*args, **kwargs):
    print("TRAINED", flush=True)
    return trained(*args, **kwargs)


networks.training.train = train
sys.exit(oneshot.main([
    "--epochs", "1", "--arch", "one_block_cnn", "--attack", "badnets", "--seeds", "2",
    "--defence", "clp", "--sweep", "on", "--out", folder, "--distributed",
    "--coordinator", f"localhost:{port}", "--num_hosts", hosts, "--host", host]))
