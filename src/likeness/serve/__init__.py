"""An HTTP service with the OpenAI images API: engine, jobs, schema and routes (docs/serve.md)."""
