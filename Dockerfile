# syntax=docker/dockerfile:1
# Mote on the CPU. For an NVIDIA GPU, build from a CUDA development image with `--features cuda` and run on its runtime image.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --bin mote

FROM debian:bookworm-slim
# pip is how `mote pull` fetches the default model; ca-certificates is for model hubs. Versions follow the base image's security updates.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl python3-pip \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 mote \
    && install --directory --owner=mote --group=mote /data /cache
COPY --from=build /src/target/release/mote /usr/local/bin/mote
USER 10001
ENV MOTE_DATA_DIR=/data MOTE_CACHE_DIR=/cache MOTE_LISTEN=0.0.0.0:8080 MOTE_LOG_FORMAT=json
VOLUME ["/data", "/cache"]
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s CMD ["curl", "--fail", "--silent", "--output", "/dev/null", "http://127.0.0.1:8080/readyz"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["mote"]
CMD ["serve"]
