// Vercel's ai-sdk against a gateway: one line of JSON per case, and no word with any other machine.

import net from 'node:net';

const connect = net.Socket.prototype.connect;
net.Socket.prototype.connect = function (...given) {
  const options = Array.isArray(given[0]) ? given[0][0] : given[0];
  const host = options?.host ?? 'localhost';
  if (!['127.0.0.1', '::1', 'localhost'].includes(host)) throw new Error(`connected to ${host}`);
  return connect.apply(this, given);
};

const { createOpenAICompatible } = await import('@ai-sdk/openai-compatible');
const { embed, embedMany, generateObject, generateText, streamText, tool } = await import('ai');
const { z } = await import('zod');

const { SHOAL_BASE: baseURL, SHOAL_KEY: apiKey, SHOAL_MODEL: name } = process.env;
const provider = (key = apiKey) =>
  createOpenAICompatible({ name: 'shoal', baseURL, apiKey: key, includeUsage: true, supportsStructuredOutputs: true });
const model = provider().chatModel(name);

const schema = z.object({
  colour: z.enum(['red', 'black']),
  number: z.union([z.literal(1), z.literal(2), z.literal(3)]),
});

const cases = {
  async whole() {
    const messages = [
      { role: 'user', content: 'hi' },
      { role: 'assistant', content: 'hello' },
      { role: 'user', content: 'say it' },
    ];
    const answer = await generateText({ model, system: 'Be brief.', messages, maxRetries: 0 });
    return { text: answer.text, finish: answer.finishReason, usage: answer.usage };
  },
  async streamed() {
    const answer = streamText({ model, prompt: 'say it', maxRetries: 0 });
    const pieces = [];
    for await (const piece of answer.textStream) pieces.push(piece);
    return { text: pieces.join(''), pieces: pieces.length, finish: await answer.finishReason, usage: await answer.usage };
  },
  async completion() {
    const answer = await generateText({ model: provider().completionModel(name), prompt: 'say it', maxRetries: 0 });
    return { text: answer.text };
  },
  async limited() {
    const answer = await generateText({ model, prompt: 'say it', maxOutputTokens: 1, temperature: 0 });
    return { finish: answer.finishReason, tokens: answer.usage.outputTokens };
  },
  async embeddings() {
    const model = provider().embeddingModel(name);
    const many = await embedMany({ model, values: ['one', 'two'], maxRetries: 0 });
    return { many: many.embeddings, query: (await embed({ model, value: 'one', maxRetries: 0 })).embedding };
  },
  async tools() {
    const tools = { Pick: tool({ description: 'Pick a card.', inputSchema: schema }) };
    const whole = await generateText({
      model, tools, toolChoice: 'required', prompt: 'pick a card', maxOutputTokens: 400, seed: 3, maxRetries: 0,
    });
    const streamed = streamText({
      model, tools, toolChoice: 'required', prompt: 'pick a card', maxOutputTokens: 400, seed: 3, maxRetries: 0,
    });
    const again = (await streamed.toolCalls)[0];
    const [call] = whole.toolCalls;
    return { name: call.toolName, arguments: call.input, streamed: again.input, finish: whole.finishReason };
  },
  async structured() {
    const answer = await generateObject({
      model, schema, prompt: 'pick a card', maxOutputTokens: 400, seed: 3, maxRetries: 0,
    });
    return answer.object;
  },
  bad_key: () => generateText({ model: provider('sk-shoal-wrong').chatModel(name), prompt: 'hi' }),
  unknown_model: () => generateText({ model: provider().chatModel('nope'), prompt: 'hi' }),
  async broken() {
    const errors = [];
    const answer = streamText({ model, prompt: 'broken', onError: ({ error }) => errors.push(error) });
    let text = '';
    for await (const part of answer.fullStream) {
      if (part.type === 'text-delta') text += part.text;
      if (part.type === 'error') errors.push(part.error);
    }
    if (errors.length) throw errors[0] instanceof Error ? errors[0] : new Error(JSON.stringify(errors[0]));
    return text;
  },
  async retried() {
    return (await generateText({ model, prompt: 'busy once: ai-sdk' })).text;
  },
};

for (const [name, run] of Object.entries(cases)) {
  let line;
  try {
    line = { result: await run() };
  } catch (error) {
    line = { raised: error.name, text: error.message, code: error.statusCode ?? null };
  }
  console.log(JSON.stringify({ case: name, ...line }));
}
