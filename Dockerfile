# An image that serves models of this package: docker run ... quantize-serve /models/int8.pth
FROM python:3.11-slim

# A compiler for the native kernels, which the installed package then carries.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /app
COPY pyproject.toml setup.py README.md LICENSE ./
COPY quantize quantize
# torch's wheels for CPUs are much smaller: give pytorch.org's index of them as a build argument.
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir ".[serve]"

RUN useradd --create-home server
USER server
ENV GOMP_SPINCOUNT=10000
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["quantize", "serve", "--host", "0.0.0.0"]
CMD ["/models"]
