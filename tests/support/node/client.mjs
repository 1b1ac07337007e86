// Calls a running service from Node, with plain grpc-js and the protos as files.
//
//   node client.mjs ADDRESS TENANT
//
// prints one JSON document, which tests/api/test_other_clients.py checks.
import { randomUUID } from 'node:crypto'
import { fileURLToPath } from 'node:url'

import grpc from '@grpc/grpc-js'
import { loadSync } from '@grpc/proto-loader'

const [address, tenant] = process.argv.slice(2)

const definition = loadSync(
  ['chat_ticket/v1/chat_session.proto', 'chat_ticket/v1/chat_message.proto'],
  {
    includeDirs: [fileURLToPath(new URL('../../../protos', import.meta.url))],
    keepCase: true,
    longs: String, // an int64 does not fit a JavaScript number
    enums: String,
    defaults: true,
    oneofs: true, // response.event names the field that is set
  },
)
const { chat_ticket: { v1 } } = grpc.loadPackageDefinition(definition)

const options = { 'grpc.enable_http_proxy': 0 }
const credentials = grpc.credentials.createInsecure()
const sessions = new v1.ChatSessionService(address, credentials, options)
const messages = new v1.ChatMessageService(address, credentials, options)

function metadata() {
  const metadata = new grpc.Metadata()
  metadata.set('x-tenant-id', tenant)
  return metadata
}

const deadline = () => ({ deadline: Date.now() + 30_000 })

/** A unary call as a promise. */
function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata(), deadline(), (error, response) =>
      error ? reject(error) : resolve(response))
  })
}

/** Passes every response of a stream to `each`, and returns the final status code. */
async function readStream(client, method, request, each) {
  const stream = client[method](request, metadata(), deadline())
  const status = new Promise((resolve) => stream.on('status', resolve))
  for await (const response of stream) await each(response)
  return (await status).code
}

/** The error of a call that must fail, or null if it succeeds. */
async function refusal(client, method, request) {
  try {
    await call(client, method, request)
    return null
  } catch (error) {
    const [details] = error.metadata.get('grpc-status-details-bin')
    return { code: error.code, text: error.details, details: details?.toString('base64') }
  }
}

const saw = {}
const session_id = randomUUID()

saw.session = (await call(sessions, 'CreateChatSession', { session: { id: session_id } })).session

const first = {
  id: randomUUID(),
  role: 'CHAT_MESSAGE_ROLE_USER',
  content: 'naïve café 中文 שלום 👩‍👩‍👧‍👦\n\ttab',
  metadata_json: '{"big": 9007199254740993}', // 2^53 + 1, which no JavaScript number can hold
  attachments: [
    { file_url: 'https://files.example/%E6%97%A5.png', file_name: '日.png', file_type: 'image/png' },
  ],
}
saw.sent = first
saw.message = (await call(messages, 'CreateChatMessage', { session_id, message: first })).message

const batch = Array.from({ length: 100 }, (_, number) => ({
  role: 'CHAT_MESSAGE_ROLE_ASSISTANT',
  content: `answer ${number}`,
}))
saw.created = (
  await call(messages, 'BatchCreateChatMessages', { session_id, messages: batch })
).messages

saw.list = { responses: [] }
saw.list.status = await readStream(messages, 'ListChatMessages', { session_id }, (response) => {
  saw.list.responses.push(response)
})

// The history, then a message created during the watch, then the deletion of the session.
const live = { role: 'CHAT_MESSAGE_ROLE_USER', content: 'are you there? 👋' }
let caughtUp = false
saw.watch = { responses: [] }
saw.watch.status = await readStream(
  sessions,
  'WatchChatSession',
  { session_id, after_revision: 0 },
  async (response) => {
    saw.watch.responses.push(response)
    if (response.event === 'caught_up') {
      caughtUp = true
      await call(messages, 'CreateChatMessage', { session_id, message: live })
    } else if (response.event === 'messages_created' && caughtUp) {
      await call(sessions, 'DeleteChatSession', { session_id })
    }
  },
)

saw.refusals = {
  malformed: await refusal(sessions, 'CreateChatSession', { session: { id: 'x', status: 77 } }),
  absent: await refusal(sessions, 'GetChatSession', { session_id }),
}

console.log(JSON.stringify(saw))
sessions.close()
messages.close()
