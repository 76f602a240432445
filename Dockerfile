# syntax=docker/dockerfile:1
# vLLM's own images with this plugin in them.
#
#   docker build -t vllm-kvcrush .                        CPU, what this release supports
#   docker build -t vllm-kvcrush:cuda --target cuda .     see below
#   docker build --target sbom --output type=local,dest=. .   bom.json, CycloneDX
#
# The tags are those of the release that the plugin was verified with. Pin what you have tested by
# its digest: --build-arg CPU_IMAGE=vllm/vllm-openai-cpu@sha256:...
ARG CPU_IMAGE=vllm/vllm-openai-cpu:v0.32.0
ARG CUDA_IMAGE=vllm/vllm-openai:v0.32.0
ARG BOM_TOOL=cyclonedx-bom==7.5.0

# The kernels are compiled where they will run, against the same C++ library.
FROM ${CPU_IMAGE} AS cpu-wheel
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY vllm_kvcrush vllm_kvcrush
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM ${CUDA_IMAGE} AS cuda-wheel
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY csrc csrc
COPY vllm_kvcrush vllm_kvcrush
RUN python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# For whoever measures on a GPU (docs/gpu.md). This release REFUSES to start on one, with the
# reason; nothing in this image has been seen on a GPU. Not what to deploy.
FROM ${CUDA_IMAGE} AS cuda
RUN --mount=type=bind,from=cuda-wheel,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --uid 10001 --create-home --home-dir /var/lib/kvcrush kvcrush
ENV HOME=/var/lib/kvcrush VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
COPY deploy/vllm/serve.yaml /etc/kvcrush/serve.yaml
USER 10001:10001
WORKDIR /var/lib/kvcrush
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
CMD ["--config", "/etc/kvcrush/serve.yaml"]

FROM ${CPU_IMAGE} AS runtime
RUN --mount=type=bind,from=cpu-wheel,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir --no-deps /wheels/*.whl \
    && useradd --uid 10001 --create-home --home-dir /var/lib/kvcrush kvcrush
ENV HOME=/var/lib/kvcrush VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
COPY deploy/vllm/serve.yaml /etc/kvcrush/serve.yaml
USER 10001:10001
WORKDIR /var/lib/kvcrush
EXPOSE 8000
# A start compiles nothing, but loads a model and may take statistics of it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
CMD ["--config", "/etc/kvcrush/serve.yaml"]

# What is in it, by a tool that is not.
FROM runtime AS bom
ARG BOM_TOOL
RUN python3 -m venv /tmp/bom \
    && /tmp/bom/bin/pip install --no-cache-dir "${BOM_TOOL}" \
    && /tmp/bom/bin/cyclonedx-py environment --output-file /tmp/bom.json "$(command -v python3)"
FROM scratch AS sbom
COPY --from=bom /tmp/bom.json /bom.json

FROM runtime AS cpu
