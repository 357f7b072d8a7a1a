# A service for SmolLM2 on a CPU: docker build -t keifu . && docker run --rm -p 8000:8000 keifu
FROM python:3.12-slim AS build

# The compiler makes the native step of the wheel, which chooses its instructions when it runs; any version of it does.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/keifu
COPY pyproject.toml README.md LICENSE ./
COPY packaging packaging
COPY src ./src
COPY docs/lineage/lineage.json docs/lineage/
COPY docs/pictures docs/pictures
COPY examples/single examples/single
RUN KEIFU_WHEEL=native pip wheel --no-cache-dir --no-deps --wheel-dir /opt/wheels .

FROM python:3.12-slim

# The dependencies and their versions are in the wheel.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/opt/wheels,target=/opt/wheels \
    pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "$(echo /opt/wheels/keifu-*.whl)[audio,serve,svg]" \
    && useradd --create-home --uid 1000 keifu

USER 1000
WORKDIR /home/keifu
ENV KEIFU_CACHE=/home/keifu/cache
# The weights are part of the image, so that it needs no network when it runs.
RUN keifu data get smollm2

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# Whoever reaches the port may ask; --api-key or KEIFU_API_KEY closes it.
ENTRYPOINT ["keifu", "serve", "--host", "0.0.0.0"]
CMD ["smollm2"]
