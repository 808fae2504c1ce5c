# ray-ckpt with Ray and a torch for CUDA, for clusters whose nodes are containers: docs/howto/image.md.
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# wget is what KubeRay's probes call; rsync and ssh are what Ray's cluster launcher does.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -yq --no-install-recommends openssh-client python3 python3-venv rsync wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --shell /bin/bash --uid 10001 ray

USER 10001
WORKDIR /home/ray/ray-ckpt
ENV PATH=/home/ray/venv/bin:$PATH RAY_USAGE_STATS_ENABLED=0

COPY --chown=ray:ray constraints.txt pyproject.toml README.md LICENSE ./
COPY --chown=ray:ray ray_ckpt ray_ckpt
COPY --chown=ray:ray jobs jobs
# The torch of PyPI brings the CUDA libraries that it was built with. Nothing is fetched when the image runs.
RUN python3 -m venv /home/ray/venv \
    && pip install --no-cache-dir -c constraints.txt .

CMD ["ray-ckpt", "--help"]
