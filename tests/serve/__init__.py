"""A real vLLM and no mocks: `make test-serve`, which sets LEWIS_SERVE; `make test` leaves these out."""
