# The HTTP service with the bundled models (docs/serve.md). The default is PyTorch's CUDA build; for a CPU image, name an
# index with CPU builds:
#   docker build --build-arg TORCH_INDEX=<index of CPU builds, see pytorch.org> -t likeness .
#   docker run --rm -p 127.0.0.1:8000:8000 -v likeness-data:/data likeness
# With --entrypoint likeness, every other command:
#   docker run --rm --entrypoint likeness -v "$PWD:/images" likeness generate "a smiling woman" --out /images/face.png
FROM python:3.12-slim
ARG TORCH_INDEX=""
RUN apt-get update && apt-get install -y --no-install-recommends make && rm -rf /var/lib/apt/lists/*
WORKDIR /likeness
COPY . .
RUN python -m venv .venv \
    && .venv/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r requirements/torch.txt \
    && PIP_NO_CACHE_DIR=1 make .venv/.serve \
    && useradd --create-home likeness && mkdir /data && chown likeness /data
USER likeness
ENV PATH=/likeness/.venv/bin:$PATH
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["likeness", "serve", "--host", "0.0.0.0", "--data", "/data"]
CMD ["--model", "mmface-mini-fast"]
