# likeness with its bundled models. The default is PyTorch's CUDA build; for a CPU image, name an index with CPU builds:
#   docker build --build-arg TORCH_INDEX=<index of CPU builds, see pytorch.org> -t likeness .
#   docker run --rm -v "$PWD:/images" likeness generate "a smiling woman" --out /images/
FROM python:3.12-slim
ARG TORCH_INDEX=""
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /likeness
COPY . .
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r requirements/torch.txt \
    && PIP_NO_CACHE_DIR=1 make .venv/.core
ENTRYPOINT ["/likeness/.venv/bin/likeness"]
CMD ["--help"]
