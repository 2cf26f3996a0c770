# The server in a container: `leveret serve`, for a CPU or for CUDA, as a user without rights.
#
#   docker build -t leveret .                            # for a CPU
#   docker build -t leveret:cuda --build-arg DEVICE=cuda .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/quickstart:/model:ro" --read-only --tmpfs /tmp leveret
#
# docs/run-elsewhere.md says more: a token, GPUs, models of the hub.
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/leveret
ENV PATH=/opt/leveret/bin:$PATH
WORKDIR /src
COPY constraints.txt ./
# torch alone, so that a change of leveret's code does not fetch it again. PyPI's brings CUDA; the CPU's own is far smaller.
RUN case "$DEVICE" in \
      cpu) index=https://download.pytorch.org/whl/cpu ;; \
      cuda) index=https://pypi.org/simple ;; \
      *) echo "DEVICE is $DEVICE; allowed are cpu and cuda" >&2; exit 2 ;; \
    esac; \
    pip install --constraint constraints.txt --index-url "$index" --extra-index-url https://pypi.org/simple torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
# 8 and 4 bits (--load-in) are for GPUs alone.
RUN extras=serve; if [ "$DEVICE" = cuda ]; then extras=serve,quant; fi; \
    pip install --constraint constraints.txt ".[$extras]"

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="leveret" org.opencontainers.image.licenses="Apache-2.0"
# /cache is for models of the hub; nothing else is ever written but /tmp, so the root may be read-only.
RUN groupadd --gid 10001 leveret \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin leveret \
    && install --directory --owner leveret --group leveret /cache
COPY --from=build /opt/leveret /opt/leveret
ENV PATH=/opt/leveret/bin:$PATH HOME=/cache HF_HOME=/cache/huggingface \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /cache
EXPOSE 8000
# SIGTERM drains; whoever stops the container should wait longer than --drain (8 seconds): docker stop --time 15
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["leveret"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
