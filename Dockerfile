# evac_jax for NVIDIA GPUs, on the system that is tested: Debian 12, Python 3.11. docs/install.md tells more.
# CUDA comes from pip, so a plain image does; the host brings the driver and NVIDIA's container toolkit.
FROM python:3.11-slim-bookworm

# make installs; a C compiler is what torch.compile needs (world_model.compile).
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PIP_NO_CACHE_DIR=1

WORKDIR /evac_jax

# Before the code, so that a change of it does not install again.
COPY Makefile requirements.txt requirements-dev.txt requirements-cuda.txt ./
RUN make install-cuda

COPY . .
ENTRYPOINT [".venv/bin/python", "launch.py"]
CMD ["--config=configs/grpo.py"]
